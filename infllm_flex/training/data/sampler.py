"""Sample ``index`` of a stage: a function of seed, stage and index, with no state to save."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from infllm_flex.training.data.batch import NO_LABEL, Batch
from infllm_flex.training.data.errors import DataError
from infllm_flex.training.data.mixing import Mixture, seed_of
from infllm_flex.training.data.packing import Piece, pack
from infllm_flex.training.data.store import Documents


class Sampler(Protocol):
    """Finds samples by number, whatever was asked for before."""

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices``, one per row."""


class WindowSampler:
    """Windows of one stream of text, regardless of where its documents end.

    The stream is cut at an offset that moves from epoch to epoch; an epoch is one permutation of
    the windows, so none comes twice and none is skipped, wherever a run is resumed.

    Args:
        stream: ``[N]``, integers of any type.
        length: Tokens per sample.
        seed: Of the run.
        name: Of the stage.

    Raises:
        DataError: The stream has less than two windows.
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

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices``, one per row."""
        starts = [self._start(index) for index in indices]
        rows = torch.stack([self._stream[s : s + self._length + 1] for s in starts]).long()
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self._count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(f"{self._key}/{epoch}"))
            offset = torch.randint(self._length, (), generator=generator)
            order = torch.randperm(self._count, generator=generator)
            self._epoch, self._starts = epoch, order * self._length + offset
        return int(self._starts[place])


class PackedSampler:
    """Rows of whole documents, mixed by length, as few of them cut as can be.

    Args:
        documents: The text.
        length: Tokens per row.
        seed: Of the run.
        name: Of the stage.
        buckets: Bounds of the length classes, see `Mixture`.

    Raises:
        DataError: There are no documents, or none of a class.
    """

    def __init__(
        self,
        documents: Documents,
        length: int,
        seed: int,
        name: str,
        buckets: Sequence[int] = (),
    ) -> None:
        self._documents, self._length, self._key = documents, length, f"{seed}/{name}"
        self._mixture = Mixture(documents, length, buckets, self._key)
        self._first_rows = [0]  # of every window known so far, and of the next
        self._window, self._rows = -1, list[list[Piece]]()

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices``, one per row, padded at the end of the row."""
        rows = [self._row(self._pieces(index)) for index in indices]
        return Batch(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def _pieces(self, index: int) -> list[Piece]:
        while self._first_rows[-1] <= index:
            window = len(self._first_rows) - 1
            rows = -(-self._mixture.num_tokens(window) // self._length)
            self._first_rows.append(self._first_rows[-1] + rows)
        window = bisect.bisect_right(self._first_rows, index) - 1
        if window != self._window:
            self._window, self._rows = window, self._pack(window)
        return self._rows[index - self._first_rows[window]]

    def _pack(self, window: int) -> list[list[Piece]]:
        rows = pack(self._mixture.window(window), self._length)
        # Packing puts long documents first; no step should see only those.
        generator = torch.Generator().manual_seed(seed_of(f"{self._key}/rows/{window}"))
        return [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]

    def _row(self, pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.zeros(self._length, dtype=torch.int64)
        labels = torch.full((self._length,), NO_LABEL, dtype=torch.int64)
        positions = torch.empty(self._length, dtype=torch.int64)
        first = 0
        for piece in pieces:
            last = first + piece.length
            text = self._documents.tokens[piece.start : piece.start + piece.length + piece.goes_on]
            ids[first:last] = text[: piece.length]
            labels[first : first + len(text) - 1] = text[1:]
            torch.arange(piece.length, out=positions[first:last])
            first = last
        torch.arange(self._length - first, out=positions[first:])
        return ids, labels, positions
