"""Local text as bytes, split by file into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infllm_flex.training.data.errors import DataError
from infllm_flex.training.data.files import find_files
from infllm_flex.training.settings import DataSettings

_SEPARATOR = b"\n\n"
_MAX_BYTES = 2**32


@dataclass(frozen=True)
class TextFile:
    """A file of the corpus: its path relative to the source, with forward slashes, and bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Files in the order of the hash of their names, so that neighbours are unrelated."""

    train: tuple[TextFile, ...]
    held_out: tuple[TextFile, ...]

    def train_stream(self) -> Tensor:
        """All training files behind one another, uint8 ``[N]``."""
        return _as_tensor(_SEPARATOR.join(file.content for file in self.train))


def load_corpus(settings: DataSettings) -> Corpus:
    """Read the files and split them.

    Which part a file belongs to depends on its relative path alone, so it is the same on every
    machine and stays so when files are added. A copy of a training file is not held out.

    Raises:
        DataError: No files, too much text, or a part would be empty.
    """
    root, names = find_files(settings)
    files = [TextFile(name, (root / name).read_bytes()) for name in names]
    files = sorted((f for f in files if f.content.strip()), key=lambda file: _hash(file.name))
    if sum(len(file.content) for file in files) > _MAX_BYTES:
        raise DataError(
            f"data.source: more than {_MAX_BYTES} bytes of text in {root}: "
            "set data.packing to documents, which does not hold the text in memory"
        )
    limit = settings.held_out_percent
    train = [file for file in files if _hash(file.name) % 100 >= limit]
    known = {hashlib.sha256(file.content).digest() for file in train}
    held_out = [
        file
        for file in files
        if _hash(file.name) % 100 < limit and hashlib.sha256(file.content).digest() not in known
    ]
    if not train:
        raise DataError(f"data.source: none of the {len(files)} text files in {root} to train on")
    if limit and not held_out:
        raise DataError(
            f"data.held_out_percent: {limit} % of the {len(files)} files in {root} is none; "
            "give more files or a larger share, or 0 to hold out nothing"
        )
    return Corpus(tuple(train), tuple(held_out))


def held_out_windows(files: Sequence[TextFile], length: int, count: int) -> Tensor:
    """Stretches of held-out text, each within one file and none overlapping another.

    Files take turns, so that a long one does not fill the list.

    Args:
        files: The held-out files.
        length: Tokens the model sees; one more is cut, to be predicted.
        count: How many to cut at most.

    Returns:
        int64 ``[N, length + 1]``, N at most ``count``.

    Raises:
        DataError: No file is long enough.
    """
    size = length + 1
    windows: list[Tensor] = []
    turn = 0
    while len(windows) < count:
        longer = [file for file in files if len(file.content) >= (turn + 1) * size]
        if not longer:
            break
        windows += [_as_tensor(f.content[turn * size : (turn + 1) * size]) for f in longer]
        turn += 1
    if not windows:
        raise DataError(f"data.source: no held-out file has {size} bytes")
    return torch.stack(windows[:count]).long()


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
