"""Text to token numbers: bytes, or the tokenizer of a model."""

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
    """How text becomes tokens.

    Attributes:
        dtype: Of the tokens as stored.
        vocabulary: Token numbers are below this.
        before: Tokens before each document, as stored.
        after: Tokens behind each document, as stored.
        fingerprint: Differs where the tokens of a text would.
    """

    dtype: torch.dtype
    vocabulary: int
    before: bytes
    after: bytes
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The tokens of each text, as stored."""


class Bytes:
    """One token per byte of UTF-8."""

    dtype, vocabulary, before, after = torch.uint8, BYTE_VALUES, b"", b""
    fingerprint = "bytes"

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The tokens of each text, as stored."""
        return [text.encode() for text in texts]


class ModelTokenizer:
    """The tokenizer in a local folder; each document ends with its end-of-text token.

    Args:
        folder: With ``tokenizer.json`` or what else transformers reads. None of its code is run.

    Raises:
        DataError: There is no tokenizer that works without code of its own.
    """

    dtype = torch.int32

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"data.tokenizer: no tokenizer in {folder}: {reason}") from error
        self.vocabulary = len(self._tokenizer)
        end = self._tokenizer.eos_token_id
        begin = [token for token in self._tokenizer("")["input_ids"] if token != end]
        self.before = _stored(begin)
        self.after = b"" if end is None else _stored([end])
        whole = [self._tokenizer.get_vocab(), begin, end, _rules(self._tokenizer)]
        self.fingerprint = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The tokens of each text, as stored."""
        found = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [_stored(ids) for ids in found["input_ids"]]


def encoding_of(settings: DataSettings, model: Path | None) -> Encoding:
    """The encoding that ``data.tokenizer`` asks for.

    Args:
        settings: The ``data`` section.
        model: The folder that ``model`` means.

    Raises:
        DataError: There is no such tokenizer.
    """
    if settings.tokenizer == "bytes":
        return Bytes()
    if settings.tokenizer != "model":
        return ModelTokenizer(Path(settings.tokenizer).expanduser())
    if model is None:
        raise DataError("data.tokenizer: model.tiny has no tokenizer; use bytes, or give a folder")
    return ModelTokenizer(model)


def _rules(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(tokenizer).__name__ if backend is None else backend.to_str()


def _stored(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
