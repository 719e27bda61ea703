"""Open the training text as the settings ask: one stream of bytes, or documents."""

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
    """Training text.

    Attributes:
        identity: Equal exactly for equal text.
        vocabulary: Size of the vocabulary.
    """

    identity: str
    vocabulary: int

    def sampler(self, name: str, stage: StageSettings, seed: int) -> Sampler:
        """The sampler of a stage."""


class StreamText:
    """All files concatenated, as bytes."""

    vocabulary = BYTE_VALUES

    def __init__(self, corpus: Corpus) -> None:
        self._stream = corpus.train_stream()
        self.identity = hashlib.sha256(self._stream.numpy().data).hexdigest()

    def sampler(self, name: str, stage: StageSettings, seed: int) -> Sampler:
        """A sampler of windows of the stream."""
        return WindowSampler(self._stream, stage.max_length, seed, name)


class DocumentText:
    """Documents in a token store."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store
        self.identity, self.vocabulary = store.identity, store.vocabulary

    def sampler(self, name: str, stage: StageSettings, seed: int) -> Sampler:
        """A sampler of rows of packed documents."""
        bounds = stage.length_buckets
        return PackedSampler(self.store.train, stage.max_length, seed, name, bounds)


def open_text(
    settings: DataSettings, folder: Path, model: Path | None = None, corpus: Corpus | None = None
) -> Text:
    """Open the text.

    Documents are tokenised once, into a token store that later runs with the same settings and
    files reuse. Concurrent processes wait for the first one.

    Args:
        settings: The ``data`` section.
        folder: Folder of the token stores if ``data.cache`` is not set.
        model: The model folder, for ``data.tokenizer: model``.
        corpus: The files, if the caller has already read them.

    Raises:
        DataError: The text is missing, damaged or too short.
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


def token_unit(text: Text) -> str:
    """The unit of a token of the text, ``"byte"`` or ``"token"``."""
    return "byte" if text.vocabulary == BYTE_VALUES else "token"


def check_vocabulary(text: Text, vocab_size: int) -> None:
    """Check that the tokens of the text are in a model's vocabulary; warn if they are bytes.

    Args:
        text: The training text.
        vocab_size: Size of the model's vocabulary.

    Raises:
        ValueError: The vocabulary of the text is larger.
    """
    if text.vocabulary > vocab_size:
        raise ValueError(
            f"data.tokenizer: it has {text.vocabulary} tokens, the model has {vocab_size}: "
            "set data.tokenizer to model"
        )
    if token_unit(text) == "byte" and vocab_size > 2 * BYTE_VALUES:
        warnings.warn(
            f"data.tokenizer: bytes are not the {vocab_size} tokens that the model was trained "
            "with: set data.tokenizer to model and data.packing to documents",
            stacklevel=2,
        )
