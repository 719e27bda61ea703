"""Encode text as tokens: bytes, or the tokenizer of a model."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from infllm_flex.training.data.errors import DataError
from infllm_flex.training.settings import DataSettings

BYTE_VALUES = 256


class Encoding(Protocol):
    """An encoding of text as tokens.

    Attributes:
        dtype: Dtype of the stored tokens.
        vocabulary: Size of the vocabulary.
        prefix: Stored tokens before each document.
        suffix: Stored tokens after each document.
        fingerprint: Differs between encodings that can give different tokens for a text.
    """

    dtype: torch.dtype
    vocabulary: int
    prefix: bytes
    suffix: bytes
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Encode each text; returns the bytes of its stored tokens."""


class Bytes:
    """One token per byte of UTF-8."""

    dtype, vocabulary, prefix, suffix = torch.uint8, BYTE_VALUES, b"", b""
    fingerprint = "bytes"

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Encode each text; returns the bytes of its stored tokens."""
        return [text.encode() for text in texts]


class ModelTokenizer:
    """The tokenizer in a local folder; each document ends with its end-of-text token.

    Args:
        folder: A folder with ``tokenizer.json`` or other files that transformers reads. No code of
            the folder is run.

    Raises:
        DataError: There is no tokenizer, or it needs code of the folder.
    """

    dtype = torch.int32

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise DataError(
                f"data.tokenizer: no tokenizer in {folder}: {reason}; set data.tokenizer to bytes, "
                "or to a folder with tokenizer.json"
            ) from error
        self.vocabulary = len(self._tokenizer)
        end = self._tokenizer.eos_token_id
        begin = [token for token in self._tokenizer("")["input_ids"] if token != end]
        self.prefix = _stored(begin)
        self.suffix = b"" if end is None else _stored([end])
        content = [self._tokenizer.get_vocab(), begin, end, _rules(self._tokenizer)]
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Encode each text; returns the bytes of its stored tokens."""
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [_stored(ids) for ids in encoded["input_ids"]]


def encoding_of(settings: DataSettings, model: Path | None) -> Encoding:
    """The encoding of ``data.tokenizer``.

    Args:
        settings: The ``data`` section.
        model: The model folder, for ``data.tokenizer: model``.

    Raises:
        DataError: There is no such tokenizer.
    """
    if settings.tokenizer == "bytes":
        return Bytes()
    if settings.tokenizer != "model":
        return ModelTokenizer(Path(settings.tokenizer).expanduser())
    if model is None:
        raise DataError(
            "data.tokenizer: model.tiny has no tokenizer: use bytes or the folder of a tokenizer"
        )
    return ModelTokenizer(model)


def _rules(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(tokenizer).__name__ if backend is None else backend.to_str()


def _stored(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
