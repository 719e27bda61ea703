"""The text of a run, as the settings ask for it: one stream of bytes, or documents."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Protocol

from infllm_flex.training.data.corpus import Corpus, load_corpus
from infllm_flex.training.data.encoding import BYTE_VALUES, encoding_of
from infllm_flex.training.data.errors import DataError
from infllm_flex.training.data.preparing import open_or_write
from infllm_flex.training.data.sampler import PackedSampler, Sampler, WindowSampler
from infllm_flex.training.data.store import TokenStore
from infllm_flex.training.settings import DataSettings, StageSettings


class Text(Protocol):
    """What is trained on.

    Attributes:
        identity: Equal exactly for equal text.
        vocabulary: Token numbers are below this.
    """

    identity: str
    vocabulary: int

    def sampler(self, name: str, stage: StageSettings, seed: int) -> Sampler:
        """The samples of a stage."""


class StreamText:
    """All files behind one another, as bytes."""

    vocabulary = BYTE_VALUES

    def __init__(self, corpus: Corpus) -> None:
        self._stream = corpus.train_stream()
        self.identity = hashlib.sha256(self._stream.numpy().data).hexdigest()

    def sampler(self, name: str, stage: StageSettings, seed: int) -> Sampler:
        """Windows of the stream."""
        return WindowSampler(self._stream, stage.max_length, seed, name)


class DocumentText:
    """Documents, packed into rows."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store
        self.identity, self.vocabulary = store.identity, store.vocabulary

    def sampler(self, name: str, stage: StageSettings, seed: int) -> Sampler:
        """Rows of documents."""
        bounds = stage.length_buckets
        return PackedSampler(self.store.train, stage.max_length, seed, name, bounds)


def open_text(
    settings: DataSettings, folder: Path, model: Path | None = None, corpus: Corpus | None = None
) -> Text:
    """Read the text, or find it where it was read before.

    Documents are read once, into a folder of tokens that later runs of the same settings and files
    find. Processes that ask at the same time wait for the first.

    Args:
        settings: The ``data`` section.
        folder: For the tokens, where ``data.cache`` names none.
        model: The folder that ``data.tokenizer: model`` means.
        corpus: The files, where the caller has read them before.

    Raises:
        DataError: The text is not there, damaged, or too little.
    """
    if settings.packing == "stream":
        return StreamText(corpus or load_corpus(settings))
    store = open_or_write(settings, settings.cache or folder, encoding_of(settings, model))
    if store.damaged:
        warnings.warn(
            f"data.source: left out {store.damaged} damaged documents: {store.examples[0]}",
            stacklevel=2,
        )
    if not len(store.train):
        raise DataError("data.source: there is no document of at least two tokens to train on")
    return DocumentText(store)


def check_vocabulary(text: Text, known: int) -> None:
    """See to it that a model knows the tokens of the text, and that they are likely its own.

    Args:
        text: What is trained on.
        known: Tokens of the model's vocabulary.

    Raises:
        ValueError: The text has tokens that the model does not know.
    """
    if text.vocabulary > known:
        raise ValueError(
            f"data.tokenizer: it has {text.vocabulary} tokens, the model knows {known}: "
            "set data.tokenizer to model"
        )
    if text.vocabulary == BYTE_VALUES and known > 2 * BYTE_VALUES:
        warnings.warn(
            f"data.tokenizer: text as bytes uses {BYTE_VALUES} of the model's {known} tokens, and "
            "hardly as it learnt them: set data.tokenizer to model, and data.packing to documents",
            stacklevel=2,
        )
