"""The text to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infllm_flex.strict_yaml import check_range

STDLIB = "python_stdlib"
_ROW_SUFFIXES = (".jsonl", ".parquet")
_DOCUMENT_SETTINGS = ("text_field", "tokenizer", "damaged_percent", "cache")


def has_rows(name: str) -> bool:
    """Whether a file of this name has a document in each row, and is not plain text."""
    return Path(name).suffix.lower() in _ROW_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The training text, and its conversion to rows of tokens.

    Attributes:
        source: ``python_stdlib`` for the source files of the running Python. Or a local file, a
            folder of text, ``.jsonl`` or ``.parquet`` files, or a data set saved by Hugging Face's
            ``datasets``.
        pattern: Pattern of the names of the files to read, in all subfolders.
        text_field: Key or column of the text in ``.jsonl`` and ``.parquet`` files and data sets.
        tokenizer: ``bytes`` for one token per byte, ``model`` for the tokenizer of ``model.path``
            or ``model.hub``, or a local folder.
        packing: ``stream`` concatenates the bytes of all files in memory and splits them anywhere.
            ``documents`` packs whole documents that do not attend to each other.
        held_out_percent: Percentage to hold out from training: of the files, chosen by a hash of
            their relative path, or of the documents, chosen by a hash of their text.
        damaged_percent: Largest percentage of unreadable documents to leave out with a warning.
        cache: Folder of the token stores, which runs may share. None: inside the run's folder.
        workers: Processes that prepare batches. 0: the training process itself.
    """

    source: str = STDLIB
    pattern: str = "*.txt"
    text_field: str = "text"
    tokenizer: str = "bytes"
    packing: Literal["stream", "documents"] = "stream"
    held_out_percent: int = 10
    damaged_percent: float = 1.0
    cache: Path | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        check_range("held_out_percent", self.held_out_percent, 0, 90)
        check_range("damaged_percent", self.damaged_percent, 0, 100)
        check_range("workers", self.workers, 0, 256)
        if self.source != STDLIB and not Path(self.source).expanduser().exists():
            raise ValueError(
                f"source must be {STDLIB} or a local folder or file, got {self.source!r}"
            )
        if not self.pattern or "/" in self.pattern:
            raise ValueError(f"pattern must be a file name pattern, got {self.pattern!r}")
        if not self.text_field:
            raise ValueError("text_field must name a key or column, got ''")
        if self.cache is not None and self.cache.exists() and not self.cache.is_dir():
            raise ValueError(f"cache must be a folder, got {self.cache}, which is a file")
        if self.packing == "stream":
            self._check_stream()
        self._check_tokenizer()

    def _check_stream(self) -> None:
        for name in _DOCUMENT_SETTINGS:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} has no effect with packing: stream, got {getattr(self, name)}: "
                    "set packing to documents"
                )
        for name in ("source", "pattern"):
            if has_rows(getattr(self, name)):
                raise ValueError(
                    f"{name} must be plain text with packing: stream, got "
                    f"{getattr(self, name)!r}: set packing to documents"
                )

    def _check_tokenizer(self) -> None:
        named = self.tokenizer in ("bytes", "model")
        if not named and not Path(self.tokenizer).expanduser().is_dir():
            raise ValueError(
                f"tokenizer must be bytes, model or a local folder, got {self.tokenizer!r}"
            )
