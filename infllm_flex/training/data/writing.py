"""Write documents into the files of a token store, a few megabytes of text at a time."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from infllm_flex.training.data.documents import Chunks, DamagedError
from infllm_flex.training.data.encoding import Encoding
from infllm_flex.training.data.errors import DataError
from infllm_flex.training.data.store import ABOUT, PARTS

_ENCODED_CHARACTERS = 2**22  # per call of the tokenizer; enough work for its threads
_MAX_EXAMPLES = 3


def write_store(
    folder: Path, documents: Iterable[Chunks], encoding: Encoding, held_out_percent: int
) -> None:
    """Encode documents into an empty folder, a few megabytes at a time.

    The hash of a document's first chunk decides whether it is held out, so that copies get the same
    decision. Documents of fewer than two tokens have no label and are left out.

    Args:
        folder: The empty folder.
        documents: The documents, each as an iterator of chunks.
        encoding: The encoding of the text.
        held_out_percent: Percentage of the documents to hold out.

    Raises:
        DataError: A file cannot be read at all.
    """
    parts = [_PartWriter(folder, name, encoding.dtype.itemsize) for name in PARTS]
    pipeline = _Pipeline(encoding, held_out_percent, parts)
    try:
        for chunks in documents:
            pipeline.feed(chunks)
        pipeline.flush()
    finally:
        for part in parts:
            part.close()
    about = {
        "dtype": str(encoding.dtype).removeprefix("torch."),
        "vocabulary": encoding.vocabulary,
        "documents": pipeline.documents,
        "damaged": pipeline.damaged,
        "examples": pipeline.examples,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def check_damage(folder: Path, percent: float) -> None:
    """Refuse a store if too many of its documents are damaged.

    Args:
        folder: A folder that `write_store` filled.
        percent: Largest accepted percentage of damaged documents.

    Raises:
        DataError: More documents are damaged.
    """
    about = json.loads((folder / ABOUT).read_text())
    damaged, documents = about["damaged"], about["documents"]
    if damaged * 100 > percent * documents:
        raise DataError(
            f"data.source: {damaged} of {documents} documents are damaged, more than "
            f"data.damaged_percent = {percent:g}: {about['examples'][0]}"
        )


class _PartWriter:
    """Writes the two files of a part, one document after the other."""

    def __init__(self, folder: Path, name: str, token_size: int) -> None:
        self._tokens = (folder / f"{name}_tokens.bin").open("wb")
        self._starts_path = folder / f"{name}_starts.bin"
        self._starts, self._token_size = array("q", [0]), token_size

    def write(self, tokens: bytes) -> None:
        self._tokens.write(tokens)

    def end_document(self) -> None:
        end = self._tokens.tell() // self._token_size
        if end - self._starts[-1] < 2:
            self.drop_document()
        else:
            self._starts.append(end)

    def drop_document(self) -> None:
        self._tokens.seek(self._starts[-1] * self._token_size)
        self._tokens.truncate()

    def close(self) -> None:
        self._tokens.close()
        with self._starts_path.open("wb") as file:
            self._starts.tofile(file)


class _Chunk(NamedTuple):
    part: _PartWriter
    text: str
    is_first: bool
    is_last: bool


class _Pipeline:
    """Collects chunks until one call of the tokenizer is worthwhile, and writes them to the parts.

    Attributes:
        documents: Number of documents read, damaged ones included.
        damaged: Number of damaged documents.
        examples: Error messages of the first damaged documents.
    """

    def __init__(self, encoding: Encoding, held_out_percent: int, parts: list[_PartWriter]) -> None:
        self._encoding, self._percent, self._parts = encoding, held_out_percent, parts
        self._pending: list[_Chunk] = []
        self._size = 0
        self.documents, self.damaged, self.examples = 0, 0, list[str]()

    def feed(self, chunks: Chunks) -> None:
        """Add one document."""
        self.documents += 1
        part, blank = None, True
        try:
            for text in chunks:
                is_first = part is None
                part = part or self._part_of(text)
                self._add(_Chunk(part, text, is_first, is_last=False))
                blank = blank and not text.strip()
        except DamagedError as error:
            self.damaged += 1
            if self.damaged <= _MAX_EXAMPLES:
                self.examples.append(str(error))
            self._drop_document(part)
            return
        if part is None or blank:
            self._drop_document(part)
        else:
            self._add(_Chunk(part, "", is_first=False, is_last=True))

    def flush(self) -> None:
        """Encode and write the pending chunks."""
        encoded = self._encoding.encode([chunk.text for chunk in self._pending])
        for chunk, tokens in zip(self._pending, encoded, strict=True):
            if chunk.is_first:
                chunk.part.write(self._encoding.prefix)
            chunk.part.write(tokens)
            if chunk.is_last:
                chunk.part.write(self._encoding.suffix)
                chunk.part.end_document()
        self._pending, self._size = [], 0

    def _add(self, chunk: _Chunk) -> None:
        self._pending.append(chunk)
        self._size += len(chunk.text) + 1
        if self._size >= _ENCODED_CHARACTERS:
            self.flush()

    def _drop_document(self, part: _PartWriter | None) -> None:
        """Drop the incomplete document, from the pending chunks and from the files."""
        while self._pending and not self._pending[-1].is_last:
            self._pending.pop()
        if part is not None and not self._pending:
            part.drop_document()

    def _part_of(self, text: str) -> _PartWriter:
        digest = hashlib.sha256(text.encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % 100 < self._percent
        return self._parts[held_out]
