"""Mix documents: an endless, shuffled stream per length class, with equal numbers of tokens.

Every window is a function of the seed and its number, so that any process can make any window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from infllm_flex.training.data.errors import DataError
from infllm_flex.training.data.packing import Piece
from infllm_flex.training.data.store import Documents

_ROWS_PER_WINDOW = 64  # packing wastes at most one row per window, 1.6 %


class Mixture:
    """Documents in windows of about 64 rows of tokens.

    A document longer than a row is split into pieces of a row and a rest, which are mixed
    separately. Every window has the same number of tokens of every class, up to the length of one
    piece. An epoch of a class is one permutation of its pieces.

    Args:
        documents: The documents.
        length: Tokens per row.
        bounds: Largest length of each class but the last, ascending. The last class ends at
            ``length``.
        key: The seed, as text.

    Raises:
        DataError: A class has no documents.
    """

    def __init__(self, documents: Documents, length: int, bounds: Sequence[int], key: str) -> None:
        starts, lengths, continues = _split(documents.starts, length)
        classes = torch.bucketize(lengths, torch.tensor([*bounds], dtype=torch.int64))
        self._streams = []
        for number in range(len(bounds) + 1):
            chosen = classes == number
            if not chosen.any():
                low, high = [0, *bounds][number] + 1, [*bounds, length][number]
                raise DataError(
                    f"data.source: none of the {len(documents)} documents has {low} to {high} "
                    "tokens: change length_buckets, or add documents of that length"
                )
            stream = _Stream(starts[chosen], lengths[chosen], continues[chosen], f"{key}/{number}")
            self._streams.append(stream)
        self._tokens = max(1, _ROWS_PER_WINDOW * length // len(self._streams))

    def window(self, number: int) -> list[Piece]:
        """The pieces of a window, ordered by class."""
        low, high = number * self._tokens, (number + 1) * self._tokens
        return [piece for stream in self._streams for piece in stream.between(low, high)]

    def num_tokens(self, number: int) -> int:
        """Number of tokens of a window, computed without making its pieces."""
        low, high = number * self._tokens, (number + 1) * self._tokens
        return sum(stream.position(high) - stream.position(low) for stream in self._streams)


class _Stream:
    """The pieces of one class, concatenated over epochs, each epoch in its own order.

    Positions are counted in tokens from the start of the first epoch. The first token of a piece
    is its position.
    """

    def __init__(self, starts: Tensor, lengths: Tensor, continues: Tensor, key: str) -> None:
        self._starts, self._lengths, self._continues, self._key = starts, lengths, continues, key
        self._total = int(lengths.sum())
        self._epoch = -1
        self._order, self._offsets = starts, starts  # set by _load_epoch

    def between(self, low: int, high: int) -> list[Piece]:
        """The pieces with positions in ``[low, high)``."""
        pieces = []
        for epoch in range(low // self._total, -(-high // self._total)):
            self._load_epoch(epoch)
            base = epoch * self._total
            first, last = (self._index_from(bound - base) for bound in (low, high))
            chosen = self._order[first:last]
            rows = zip(
                self._starts[chosen].tolist(),
                self._lengths[chosen].tolist(),
                self._continues[chosen].tolist(),
                strict=True,
            )
            pieces += [Piece(*row) for row in rows]
        return pieces

    def position(self, token: int) -> int:
        """Position of the first piece at or after a token."""
        epoch, rest = divmod(token, self._total)
        self._load_epoch(epoch)
        index = self._index_from(rest)
        offset = self._total if index == len(self._offsets) else int(self._offsets[index])
        return epoch * self._total + offset

    def _index_from(self, offset: int) -> int:
        return int(torch.searchsorted(self._offsets, offset))

    def _load_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(f"{self._key}/{epoch}"))
            self._order = torch.randperm(len(self._starts), generator=generator)
            lengths = self._lengths[self._order]
            self._offsets = lengths.cumsum(0) - lengths
            self._epoch = epoch


def seed_of(text: str) -> int:
    """A seed for PyTorch's generators, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _split(starts: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split documents longer than a row; returns the fields of the pieces, as in `Piece`."""
    tokens = starts.diff()
    counts = (tokens + length - 1) // length
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    within = (torch.arange(len(first)) - first) * length
    lengths = (tokens.repeat_interleave(counts) - within).clamp_max(length)
    begins = starts[:-1].repeat_interleave(counts) + within
    continues = begins + lengths < starts[1:].repeat_interleave(counts)
    # A last piece of one token has no label; the piece before already predicts that token.
    has_labels = (lengths > 1) | continues
    return begins[has_labels], lengths[has_labels], continues[has_labels]
