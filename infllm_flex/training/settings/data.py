"""The text to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infllm_flex.training.settings.bounds import check_range

STDLIB = "python_stdlib"
_OF_DOCUMENTS = ("text_field", "tokenizer", "damaged_percent", "cache")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text, and how it becomes rows of tokens.

    Attributes:
        source: ``python_stdlib`` for the sources of the Python that runs this, or a local file or
            folder: of text, of ``.jsonl`` or ``.parquet`` files, or a data set that Hugging Face's
            ``datasets`` saved.
        pattern: Which files of a folder are meant, its subfolders included.
        text_field: Key or column of the text, in all but plain text files.
        tokenizer: ``bytes``, one token each; ``model``, that of ``model.path``; or a local folder.
        packing: ``stream`` puts all files behind one another, as bytes and in memory, and cuts
            the stream anywhere; ``documents`` packs whole documents that do not see each other.
        held_out_percent: Share that is never trained on: of the files, chosen by a hash of their
            relative path, or of the documents, chosen by a hash of their text.
        damaged_percent: The largest share of unreadable documents to leave out with a warning.
        cache: Folder for the documents' tokens, to share among runs; None: inside the run's own.
        workers: Processes that prepare batches beside the training; 0: the training itself.
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
        check_range(self, "held_out_percent", 0, 90)
        check_range(self, "damaged_percent", 0, 100)
        check_range(self, "workers", 0, 256)
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
        for name in _OF_DOCUMENTS:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} has no effect where packing is stream, got {getattr(self, name)}: "
                    "set packing to documents"
                )
        for name in ("source", "pattern"):
            if Path(getattr(self, name)).suffix in (".jsonl", ".parquet"):
                raise ValueError(
                    f"{name} must be plain text where packing is stream, got "
                    f"{getattr(self, name)!r}: set packing to documents"
                )

    def _check_tokenizer(self) -> None:
        named = self.tokenizer in ("bytes", "model")
        if not named and not Path(self.tokenizer).expanduser().is_dir():
            raise ValueError(
                f"tokenizer must be bytes, model or a local folder, got {self.tokenizer!r}"
            )
