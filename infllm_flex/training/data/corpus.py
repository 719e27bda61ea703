"""Local text files as bytes, split by file into training and held-out text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infllm_flex.training.data.errors import DataError
from infllm_flex.training.data.files import find_files
from infllm_flex.training.settings import DataSettings, has_rows

_SEPARATOR = b"\n\n"
_MAX_BYTES = 2**32


@dataclass(frozen=True)
class TextFile:
    """A file of the corpus: its content, and its path relative to the source with slashes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Files ordered by the hash of their names, so that neighbours are unrelated."""

    train: tuple[TextFile, ...]
    held_out: tuple[TextFile, ...]

    def train_stream(self) -> Tensor:
        """All training files concatenated, uint8 ``[N]``."""
        return _as_tensor(_SEPARATOR.join(file.content for file in self.train))


def load_corpus(settings: DataSettings) -> Corpus:
    """Read the files and split them.

    The relative path of a file alone decides its part, so the split is the same on every machine
    and unaffected by added files. A copy of a training file is not held out.

    Raises:
        DataError: There are no files, a file is not plain text, there is too much text, or a
            part would be empty.
    """
    root, names = find_files(settings)
    _check_plain_text(root, names)
    files = [TextFile(name, (root / name).read_bytes()) for name in names]
    files = sorted((f for f in files if f.content.strip()), key=lambda file: _hash(file.name))
    if sum(len(file.content) for file in files) > _MAX_BYTES:
        raise DataError(
            f"data.source: more than {_MAX_BYTES} bytes of text in {root}: "
            "set data.packing to documents, which does not hold the text in memory"
        )
    limit = settings.held_out_percent
    train = [file for file in files if _hash(file.name) % 100 >= limit]
    train_digests = {hashlib.sha256(file.content).digest() for file in train}
    held_out = [
        file
        for file in files
        if _hash(file.name) % 100 < limit
        and hashlib.sha256(file.content).digest() not in train_digests
    ]
    if not train:
        raise DataError(
            f"data.source: none of the {len(files)} text files in {root} is left for training: "
            "add files or lower data.held_out_percent"
        )
    if limit and not held_out:
        raise DataError(
            f"data.held_out_percent: {limit} % of the {len(files)} files in {root} is none: "
            "add files, raise the percentage, or set it to 0 to hold out nothing"
        )
    return Corpus(tuple(train), tuple(held_out))


def held_out_windows(files: Sequence[TextFile], length: int, count: int) -> Tensor:
    """Non-overlapping windows of held-out text, each within one file.

    The n-th windows of all files come before any file's next window, so that a long file does not
    fill the list.

    Args:
        files: The held-out files.
        length: Input tokens; a window has one more, the last label.
        count: Maximum number of windows.

    Returns:
        int64 ``[N, length + 1]``, N at most ``count``.

    Raises:
        DataError: No file is long enough.
    """
    size = length + 1
    windows: list[Tensor] = []
    number = 0
    while len(windows) < count:
        window = slice(number * size, (number + 1) * size)
        long_enough = [file for file in files if len(file.content) >= window.stop]
        if not long_enough:
            break
        windows += [_as_tensor(file.content[window]) for file in long_enough]
        number += 1
    if not windows:
        raise DataError(f"data.source: no held-out file has {size} bytes")
    return torch.stack(windows[:count]).long()


def _check_plain_text(root: Path, names: list[str]) -> None:
    """Refuse files that are no plain text: their bytes would be trained on as they are."""
    advice = "set data.packing to documents"
    if names == ["."]:
        raise DataError(f"data.source: {root} is a data set, and not plain text: {advice}")
    if rows := [name for name in names if has_rows(name)]:
        raise DataError(
            f"data.source: {root / rows[0]} is not plain text: {advice}, or data.pattern to match "
            "the names of text files alone"
        )


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
