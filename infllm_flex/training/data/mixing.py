"""Which documents come when: an endless, shuffled stream per length class, in equal token shares.

All of it is a function of the seed and a number, so that any process finds any place by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from infllm_flex.training.data.errors import DataError
from infllm_flex.training.data.packing import Piece
from infllm_flex.training.data.store import Documents

_ROWS_PER_WINDOW = 64  # at most one row of so many is wasted: 1.6 %


class Mixture:
    """Documents in windows of about 64 rows' worth of tokens.

    A document longer than a row is cut into rows and a rest, each mixed as if it were a document.
    Every class gives every window the same number of tokens, up to its last piece. Within a class
    an epoch is one permutation: none comes twice before all came once.

    Args:
        documents: What to mix.
        length: Tokens per row.
        bounds: Lengths that separate the classes, ascending, each the longest of its class; the
            last class ends at ``length``.
        key: The seed, as text.

    Raises:
        DataError: A class has no documents.
    """

    def __init__(self, documents: Documents, length: int, bounds: Sequence[int], key: str) -> None:
        starts, lengths, goes_on = _cut(documents.starts, length)
        classes = torch.bucketize(lengths, torch.tensor([*bounds], dtype=torch.int64))
        self._streams = []
        for number in range(len(bounds) + 1):
            chosen = classes == number
            if not chosen.any():
                low, high = [0, *bounds][number] + 1, [*bounds, length][number]
                raise DataError(
                    f"data.source: none of the {len(documents)} documents has {low} to {high} "
                    "tokens: change length_buckets, or give text of that length"
                )
            stream = _Stream(starts[chosen], lengths[chosen], goes_on[chosen], f"{key}/{number}")
            self._streams.append(stream)
        self._tokens = max(1, _ROWS_PER_WINDOW * length // len(self._streams))

    def window(self, number: int) -> list[Piece]:
        """The pieces of a window, class by class."""
        low, high = number * self._tokens, (number + 1) * self._tokens
        return [piece for stream in self._streams for piece in stream.between(low, high)]

    def num_tokens(self, number: int) -> int:
        """Tokens of a window, found without making it."""
        low, high = number * self._tokens, (number + 1) * self._tokens
        return sum(stream.position(high) - stream.position(low) for stream in self._streams)


class _Stream:
    """The pieces of one class behind one another, epoch after epoch, each in an order of its own.

    Tokens are counted from the start of the first epoch. A piece belongs where its first token is.
    """

    def __init__(self, starts: Tensor, lengths: Tensor, goes_on: Tensor, key: str) -> None:
        self._starts, self._lengths, self._goes_on, self._key = starts, lengths, goes_on, key
        self._total = int(lengths.sum())
        self._epoch = -1
        self._order, self._offsets = starts, starts  # of the epoch, made when first asked for

    def between(self, low: int, high: int) -> list[Piece]:
        """The pieces that begin in ``[low, high)``."""
        found = []
        for epoch in range(low // self._total, -(-high // self._total)):
            self._enter(epoch)
            base = epoch * self._total
            first, last = (self._first_from(bound - base) for bound in (low, high))
            chosen = self._order[first:last]
            rows = zip(
                self._starts[chosen].tolist(),
                self._lengths[chosen].tolist(),
                self._goes_on[chosen].tolist(),
                strict=True,
            )
            found += [Piece(*row) for row in rows]
        return found

    def position(self, token: int) -> int:
        """Where the first piece at or behind a token begins."""
        epoch, rest = divmod(token, self._total)
        self._enter(epoch)
        place = self._first_from(rest)
        offset = self._total if place == len(self._offsets) else int(self._offsets[place])
        return epoch * self._total + offset

    def _first_from(self, offset: int) -> int:
        return int(torch.searchsorted(self._offsets, offset))

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(f"{self._key}/{epoch}"))
            self._order = torch.randperm(len(self._starts), generator=generator)
            lengths = self._lengths[self._order]
            self._offsets = lengths.cumsum(0) - lengths
            self._epoch = epoch


def seed_of(text: str) -> int:
    """A seed for PyTorch's generators, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _cut(starts: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut what is longer than a row: first tokens, lengths, and whether a document goes on."""
    tokens = starts.diff()
    counts = (tokens + length - 1) // length
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    within = (torch.arange(len(first)) - first) * length
    lengths = (tokens.repeat_interleave(counts) - within).clamp_max(length)
    begins = starts[:-1].repeat_interleave(counts) + within
    goes_on = begins + lengths < starts[1:].repeat_interleave(counts)
    # A single last token predicts nothing, and the piece before it predicts it.
    worth = (lengths > 1) | goes_on
    return begins[worth], lengths[worth], goes_on[worth]
