"""The lists of tiles in plain tensors, a chunk of tiles at a time, for the CPU."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex_ops.sizes import group_size

CHUNK_SCORES = 1 << 20  # scores of a chunk of tiles, which bound the memory beside the result


class Head(NamedTuple):
    """One key/value head of one batch row, and the query heads that share it."""

    batch: int
    kv: int
    group: slice

    def blocks(self, x: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
        """Cut ``x [B, Hkv, Skv, D]`` into ``[Nkv, block_size, D]``, the last block padded by 0."""
        x = x[self.batch, self.kv].to(dtype)
        return F.pad(x, (0, 0, 0, -x.shape[0] % block_size)).unflatten(0, (-1, block_size))


def heads(q: Tensor, k: Tensor) -> Iterator[Head]:
    """Iterate over the key/value heads of a batch."""
    G = group_size(q.shape[1], k.shape[1])
    for batch in range(k.shape[0]):
        for kv in range(k.shape[1]):
            yield Head(batch, kv, slice(kv * G, (kv + 1) * G))


class TileLists(NamedTuple):
    """The lists of ``tile_blocks``, and the sizes that they were built for."""

    num: Tensor
    idx: Tensor
    membership: Tensor
    block_size: int
    tile_tokens: int

    def spans(self, head: Head) -> Iterator[tuple[slice, int]]:
        """Iterate over a head's tiles, several at a time, with the length of their longest list."""
        counts = self.num[head.batch, head.kv].tolist()
        group = head.group.stop - head.group.start
        per_slot = self.tile_tokens * group * self.block_size
        begin = 0
        while begin < len(counts):
            width, end = counts[begin], begin + 1
            while end < len(counts):
                wider = max(width, counts[end])
                if (end + 1 - begin) * wider * per_slot > CHUNK_SCORES:
                    break
                width, end = wider, end + 1
            yield slice(begin, end), max(width, 1)
            begin = end

    def cut(self, head: Head, span: tuple[slice, int], Skv: int, Sq: int) -> "TileChunk":
        """Read the lists of a span of tiles, cut to one width."""
        (tiles, width), at = span, (head.batch, head.kv)
        num, block, bits = (x[at][tiles] for x in (self.num, self.idx, self.membership))
        listed = torch.arange(width, device=num.device) < num[:, None]
        # An unused slot repeats the first block: NaN of another would pass, as 0 x NaN is NaN.
        block = torch.where(listed, block[:, :width], block[:, :1])  # [n, W]
        bits = bits[:, :width].masked_fill(~listed, 0)
        token = torch.arange(self.tile_tokens, device=num.device)
        first = Skv - Sq + torch.arange(tiles.start, tiles.stop, device=num.device) * token.numel()
        position = first[:, None] + token  # [n, T]
        member = (bits[:, None] >> token[:, None]) & 1  # [n, T, W]
        past = position[:, :, None] - block[:, None] * self.block_size + 1
        return TileChunk(
            block.long(), past.clamp(0, self.block_size) * member, tiles, self.tile_tokens, Sq
        )


class TileChunk(NamedTuple):
    """Several tiles of one head.

    Attributes:
        slots: Listed blocks ``[n, W]``.
        seen: Keys of each block that each token sees ``[n, T, W]``, the first ones.
        tiles: Which tiles of the head.
        tile_tokens: Tokens per tile, ``T``.
        Sq: Queries of the sequence.
    """

    slots: Tensor
    seen: Tensor
    tiles: slice
    tile_tokens: int
    Sq: int

    def _tokens(self) -> slice:
        return slice(
            self.tiles.start * self.tile_tokens, min(self.tiles.stop * self.tile_tokens, self.Sq)
        )

    def load(self, head: Head, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Read rows of ``x [B, Hq, Sq, E]`` as ``[n, T * G, E]``, zero beyond the sequence."""
        rows = x[head.batch, head.group, self._tokens()].to(dtype).transpose(0, 1)  # [tokens, G, E]
        missing = self.slots.shape[0] * self.tile_tokens - rows.shape[0]
        rows = F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows
        return rows.reshape(self.slots.shape[0], -1, x.shape[-1])

    def store(self, head: Head, out: Tensor, rows: Tensor) -> None:
        """Write ``rows [n, T * G, E]`` back to ``out [B, Hq, Sq, E]``."""
        at = self._tokens()
        G = head.group.stop - head.group.start
        rows = rows.reshape(-1, G, rows.shape[-1])[: at.stop - at.start]
        out[head.batch, head.group, at] = rows.transpose(0, 1).to(out.dtype)

    def gather(self, blocks: Tensor) -> Tensor:
        """Join the listed blocks of ``[Nkv, block_size, D]``: ``[n, W * block_size, D]``."""
        return blocks[self.slots].flatten(1, 2)

    def logits(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Dot products with the gathered keys ``[n, T * G, W * block_size]``, -inf if unseen."""
        logits = rows @ keys.mT
        unseen = ~self.sees(keys)
        logits.unflatten(1, (unseen.shape[1], -1)).masked_fill_(unseen[:, :, None], -torch.inf)
        return logits

    def sees(self, gathered: Tensor) -> Tensor:
        """Return which gathered keys each token sees: bool ``[n, T, W * block_size]``."""
        block_size = gathered.shape[1] // self.slots.shape[1]
        offset = torch.arange(block_size, device=self.seen.device)
        return (offset < self.seen[..., None]).flatten(2)

    def weigh(self, weights: Tensor, values: Tensor, finite: bool) -> Tensor:
        """Sum the gathered values by ``weights [n, T * G, W * block_size]``.

        A product multiplies unseen values by zero, and 0 x NaN is NaN. Values that are not finite
        are left out of the product and added only to the rows that see them.
        """
        if finite:
            return weights @ values
        out = weights @ values.nan_to_num(0.0, 0.0, 0.0)
        seen = self.sees(values).to(weights.dtype)
        for nonfinite in (torch.inf, -torch.inf, torch.nan):
            matches = values.isnan() if nonfinite != nonfinite else values == nonfinite
            reached = (seen @ matches.to(weights.dtype) > 0)[:, :, None]  # [n, T, 1, D]
            out.unflatten(1, (seen.shape[1], -1)).add_(torch.where(reached, nonfinite, 0.0))
        return out

    def used(self) -> Tensor:
        """Return the slots of which some token sees a key: bool ``[n, W]``."""
        return self.seen.amax(1) > 0
