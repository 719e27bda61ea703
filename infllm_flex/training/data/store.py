"""Documents as tokens in two flat files per part, mapped into memory: only what is read is loaded.

``<part>_tokens.bin`` holds all tokens behind one another, ``<part>_starts.bin`` where each document
begins, as int64, and the end.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infllm_flex.training.data.documents import Chunks, DamagedError
from infllm_flex.training.data.encoding import Encoding
from infllm_flex.training.data.errors import DataError
from infllm_flex.training.manifest import MANIFEST, BrokenFolderError, read_manifest, verify

_ABOUT = "about.json"
_PARTS = ("train", "held_out")
_AT_ONCE = 2**22  # characters to encode in one call: enough for a tokenizer's own threads
_DTYPES = {"uint8": torch.uint8, "int32": torch.int32}
_REPORTED = 3


@dataclass(frozen=True)
class Documents:
    """Tokens of documents.

    Attributes:
        tokens: ``[N]``, uint8 or int32, of all documents.
        starts: int64 ``[D + 1]``, where in ``tokens`` each begins, and N.
    """

    tokens: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Tensor:
        """The tokens of one document, a view."""
        return self.tokens[int(self.starts[number]) : int(self.starts[number + 1])]


@dataclass(frozen=True)
class TokenStore:
    """The text of a run.

    Attributes:
        train: What is trained on.
        held_out: What never is.
        vocabulary: Token numbers are below this.
        damaged: Documents left out because they could not be read.
        examples: What was wrong with the first of them.
        identity: Equal exactly for equal tokens, on any machine.
    """

    train: Documents
    held_out: Documents
    vocabulary: int
    damaged: int
    examples: tuple[str, ...]
    identity: str


def write_store(
    folder: Path, documents: Iterator[Chunks], encoding: Encoding, held_out_percent: int
) -> None:
    """Encode documents into an empty folder, a few megabytes at a time.

    A document's first part decides by its hash whether it is held out, so that copies of it are
    too. Documents of fewer than two tokens have nothing to predict and are left out.

    Raises:
        DataError: A file as a whole cannot be read.
    """
    parts = [_PartWriter(folder, name, encoding.dtype.itemsize) for name in _PARTS]
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
    (folder / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def check_damage(folder: Path, percent: float) -> None:
    """Refuse text of which too much is damaged.

    Args:
        folder: What `write_store` filled.
        percent: The largest share of damaged documents to accept.

    Raises:
        DataError: More are.
    """
    about = json.loads((folder / _ABOUT).read_text())
    damaged, read = about["damaged"], about["documents"]
    if damaged * 100 > percent * read:
        raise DataError(
            f"data.source: {damaged} of {read} documents are damaged, more than "
            f"data.damaged_percent = {percent:g}: {about['examples'][0]}"
        )


def open_store(folder: Path, checksums: bool = True) -> TokenStore:
    """Map a published store into memory.

    Args:
        folder: Of the store.
        checksums: Whether to read all of it once to compare it with its manifest.

    Raises:
        DataError: It is damaged.
    """
    try:
        verify(folder, checksums)
        files = read_manifest(folder)
        about = json.loads((folder / _ABOUT).read_text())
        dtype = _DTYPES[about["dtype"]]
        train, held_out = (_open_part(folder, name, dtype) for name in _PARTS)
    except (BrokenFolderError, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{folder} is damaged ({error}): delete it, and the text is read again"
        ) from error
    text = json.dumps([about["dtype"], *(files[f"{name}_tokens.bin"] for name in _PARTS)])
    starts = json.dumps([files[f"{name}_starts.bin"] for name in _PARTS])
    return TokenStore(
        train=train,
        held_out=held_out,
        vocabulary=about["vocabulary"],
        damaged=about["damaged"],
        examples=tuple(about["examples"]),
        identity=hashlib.sha256((text + starts).encode()).hexdigest(),
    )


def is_published(folder: Path) -> bool:
    """Whether a store is there, whole or damaged."""
    return (folder / MANIFEST).is_file()


def _open_part(folder: Path, name: str, dtype: torch.dtype) -> Documents:
    return Documents(
        _map(folder / f"{name}_tokens.bin", dtype), _map(folder / f"{name}_starts.bin", torch.int64)
    )


def _map(path: Path, dtype: torch.dtype) -> Tensor:
    size = path.stat().st_size // dtype.itemsize
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)


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
