"""Documents into the files of a token store, a few megabytes of text at a time."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from pathlib import Path

from infllm_flex.training.data.documents import Chunks, DamagedError
from infllm_flex.training.data.encoding import Encoding
from infllm_flex.training.data.errors import DataError
from infllm_flex.training.data.store import ABOUT, PARTS

_AT_ONCE = 2**22  # characters to encode in one call: enough for a tokenizer's own threads
_REPORTED = 3


def write_store(
    folder: Path, documents: Iterable[Chunks], encoding: Encoding, held_out_percent: int
) -> None:
    """Encode documents into an empty folder, a few megabytes at a time.

    A document's first part decides by its hash whether it is held out, so that copies of it are
    too. Documents of fewer than two tokens have nothing to predict and are left out.

    Raises:
        DataError: A file as a whole cannot be read.
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
        "documents": pipeline.read,
        "damaged": pipeline.damaged,
        "examples": pipeline.examples,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def check_damage(folder: Path, percent: float) -> None:
    """Refuse text of which too much is damaged.

    Args:
        folder: What `write_store` filled.
        percent: The largest share of damaged documents to accept.

    Raises:
        DataError: More are.
    """
    about = json.loads((folder / ABOUT).read_text())
    damaged, read = about["damaged"], about["documents"]
    if damaged * 100 > percent * read:
        raise DataError(
            f"data.source: {damaged} of {read} documents are damaged, more than "
            f"data.damaged_percent = {percent:g}: {about['examples'][0]}"
        )


class _PartWriter:
    """The two files of a part, written document by document."""

    def __init__(self, folder: Path, name: str, token_size: int) -> None:
        self._tokens = (folder / f"{name}_tokens.bin").open("wb")
        self._starts_path = folder / f"{name}_starts.bin"
        self._starts, self._token_size = array("q", [0]), token_size

    def write(self, tokens: bytes) -> None:
        self._tokens.write(tokens)

    def end_document(self) -> None:
        end = self._tokens.tell() // self._token_size
        if end - self._starts[-1] < 2:
            self.abandon_document()
        else:
            self._starts.append(end)

    def abandon_document(self) -> None:
        self._tokens.seek(self._starts[-1] * self._token_size)
        self._tokens.truncate()

    def close(self) -> None:
        self._tokens.close()
        with self._starts_path.open("wb") as file:
            self._starts.tofile(file)


class _Pipeline:
    """Collects text until there is enough for one call of the tokenizer, and sorts it into parts.

    Attributes:
        read: Documents read, damaged ones included.
        damaged: How many are.
        examples: What was wrong with the first of those.
    """

    def __init__(self, encoding: Encoding, held_out_percent: int, parts: list[_PartWriter]) -> None:
        self._encoding, self._percent, self._parts = encoding, held_out_percent, parts
        self._waiting: list[tuple[_PartWriter, str, bool, bool]] = []  # text, begins, ends
        self._size = 0
        self.read, self.damaged, self.examples = 0, 0, list[str]()

    def feed(self, chunks: Chunks) -> None:
        """Take in one document."""
        self.read += 1
        part, blank = None, True
        try:
            for text in chunks:
                begins = part is None
                part = part or self._part_of(text)
                self._add(part, text, begins, ends=False)
                blank = blank and not text.strip()
        except DamagedError as error:
            self.damaged += 1
            if self.damaged <= _REPORTED:
                self.examples.append(str(error))
            self._forget(part)
            return
        if part is None or blank:
            self._forget(part)
        else:
            self._add(part, "", begins=False, ends=True)

    def flush(self) -> None:
        """Encode and write what waits."""
        encoded = self._encoding.encode([text for _, text, _, _ in self._waiting])
        for (part, _, begins, ends), tokens in zip(self._waiting, encoded, strict=True):
            if begins:
                part.write(self._encoding.before)
            part.write(tokens)
            if ends:
                part.write(self._encoding.after)
                part.end_document()
        self._waiting, self._size = [], 0

    def _add(self, part: _PartWriter, text: str, begins: bool, ends: bool) -> None:
        self._waiting.append((part, text, begins, ends))
        self._size += len(text) + 1
        if self._size >= _AT_ONCE:
            self.flush()

    def _forget(self, part: _PartWriter | None) -> None:
        """Drop the document that is not complete, wherever it has got to."""
        while self._waiting and not self._waiting[-1][3]:
            self._waiting.pop()
        if part is not None and not self._waiting:
            part.abandon_document()

    def _part_of(self, text: str) -> _PartWriter:
        digest = hashlib.sha256(text.encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % 100 < self._percent
        return self._parts[held_out]
