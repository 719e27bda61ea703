"""Local text as bytes, split by file into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infllm_flex.training.settings import STDLIB, DataSettings

BYTE_VALUES = 256
_SEPARATOR = b"\n\n"
_MAX_BYTES = 2**32
# Installed packages differ between machines; tests and tables are text of another kind.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings"}


class DataError(ValueError):
    """The text is not there, or there is not enough of it."""


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
    root, paths = _find(settings)
    files = [TextFile(path.relative_to(root).as_posix(), path.read_bytes()) for path in paths]
    files = sorted((f for f in files if f.content.strip()), key=lambda file: _hash(file.name))
    if sum(len(file.content) for file in files) > _MAX_BYTES:
        raise DataError(f"data.source: more than {_MAX_BYTES} bytes of text in {root}")
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


def _find(settings: DataSettings) -> tuple[Path, list[Path]]:
    if settings.source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in root.rglob("*.py") if not _NOT_LIBRARY & set(p.relative_to(root).parts)]
        hint = "this Python comes without its sources; set data.source to a folder of text"
    else:
        root = Path(settings.source).expanduser()
        if root.is_file():
            return root.parent, [root]
        paths = list(root.rglob(settings.pattern))
        hint = "set data.pattern to the names of your text files"
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"data.source: no text files in {root}: {hint}")
    return root, paths


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class Sampler:
    """Which bytes sample ``index`` is: a function of seed, name and index, with no state.

    The stream is cut into windows at an offset that moves from epoch to epoch; an epoch is one
    permutation of them, so none comes twice and none is skipped, wherever a run is resumed.
    """

    def __init__(self, stream: Tensor, length: int, seed: int, name: str) -> None:
        self._stream, self._length, self._key = stream, length, f"{seed}/{name}"
        self._count = len(stream) // length - 1  # one window less leaves room for the offset
        if self._count < 1:
            raise DataError(
                f"data.source: {len(stream)} bytes of training text are too few for sequences of "
                f"{length}; at least {2 * length} are needed"
            )
        self._epoch, self._starts = -1, torch.empty(0)

    def batch(self, indices: Iterable[int]) -> Tensor:
        """The samples of ``indices``, int64 ``[B, length + 1]``, the last token only a target."""
        starts = [self._start(index) for index in indices]
        return torch.stack([self._stream[s : s + self._length + 1] for s in starts]).long()

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self._count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_hash(f"{self._key}/{epoch}") >> 1)
            offset = torch.randint(self._length, (), generator=generator)
            order = torch.randperm(self._count, generator=generator)
            self._epoch, self._starts = epoch, order * self._length + offset
        return int(self._starts[place])
