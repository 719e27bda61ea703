"""Samplers: sample ``index`` of a stage is a function of seed, stage and index, without state."""

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
    """Makes samples by index, independent of earlier calls."""

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices``, one per row."""


class WindowSampler:
    """Windows of one stream of text; document boundaries are ignored.

    Each epoch splits the stream into windows at another offset and is one permutation of them, so
    that a resumed run repeats and skips none.

    Args:
        stream: ``[N]``, integers of any dtype.
        length: Tokens per sample.
        seed: Seed of the run.
        name: Name of the stage.

    Raises:
        DataError: The stream has less than two windows.
    """

    def __init__(self, stream: Tensor, length: int, seed: int, name: str) -> None:
        self._stream, self._length, self._key = stream, length, f"{seed}/{name}"
        self._count = len(stream) // length - 1  # one less, to leave room for the offset
        if self._count < 1:
            raise DataError(
                f"data.source: {len(stream)} bytes of training text are too few for sequences of "
                f"{length}: add text, at least {2 * length} bytes are needed"
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
    """Rows of documents, mixed by length and split as rarely as possible.

    Args:
        documents: The documents.
        length: Tokens per row.
        seed: Seed of the run.
        name: Name of the stage.
        buckets: Bounds of the length classes, see `Mixture`.

    Raises:
        DataError: A length class has no documents.
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
        self._first_rows = [0]  # first row of every window so far, and of the next window
        self._window, self._rows = -1, list[list[Piece]]()

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices``, one per row, with padding at the end of the row."""
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
        # Packing orders rows by document length; shuffling mixes them within the window.
        generator = torch.Generator().manual_seed(seed_of(f"{self._key}/rows/{window}"))
        return [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]

    def _row(self, pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.zeros(self._length, dtype=torch.int64)
        labels = torch.full((self._length,), NO_LABEL, dtype=torch.int64)
        positions = torch.empty(self._length, dtype=torch.int64)
        start = 0
        for piece in pieces:
            end = start + piece.length
            # With the next token of the document, if there is one, as the last label.
            text_end = piece.start + piece.length + piece.continues
            text = self._documents.tokens[piece.start : text_end]
            ids[start:end] = text[: piece.length]
            labels[start : start + len(text) - 1] = text[1:]
            torch.arange(piece.length, out=positions[start:end])
            start = end
        torch.arange(self._length - start, out=positions[start:])
        return ids, labels, positions
