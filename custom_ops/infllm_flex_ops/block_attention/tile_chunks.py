"""Walk tiles and their listed blocks a chunk at a time, in plain tensors; no operator itself."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SCORES = 1 << 20  # scores held at a time, over all tiles of a chunk


class Head(NamedTuple):
    """One key/value head of one batch entry, and the query heads that share it."""

    batch: int
    kv: int
    group: slice

    def blocks(self, x: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
        """Cut ``x [B, Hkv, Skv, D]`` into ``[Nkv, block_size, D]``; the last one zero-filled."""
        x = x[self.batch, self.kv].to(dtype)
        return F.pad(x, (0, 0, 0, -x.shape[0] % block_size)).unflatten(0, (-1, block_size))


def heads(q: Tensor, k: Tensor) -> Iterator[Head]:
    """Walk the key/value heads of a batch."""
    G = q.shape[1] // k.shape[1]
    for batch in range(k.shape[0]):
        for kv in range(k.shape[1]):
            yield Head(batch, kv, slice(kv * G, (kv + 1) * G))


class TileLists(NamedTuple):
    """The lists of ``tile_blocks``, and the sizes that give them a meaning."""

    num: Tensor
    idx: Tensor
    words: Tensor
    block_size: int
    tile_tokens: int

    def spans(self, head: Head) -> Iterator[tuple[slice, int]]:
        """Walk a head's tiles, several at a time, with the length of their longest list."""
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
        num, block, word = self.num[at][tiles], self.idx[at][tiles], self.words[at][tiles]
        listed = torch.arange(width, device=num.device) < num[:, None]
        # A slot without a block repeats the tile's first: another's nan would come through 0 x nan.
        block = torch.where(listed, block[:, :width], block[:, :1])  # [n, W]
        word = word[:, :width].masked_fill(~listed, 0)
        token = torch.arange(self.tile_tokens, device=num.device)
        first = Skv - Sq + torch.arange(tiles.start, tiles.stop, device=num.device) * token.numel()
        position = first[:, None] + token  # [n, T]
        member = (word[:, None] >> token[:, None]) & 1  # [n, T, W]
        past = position[:, :, None] - block[:, None] * self.block_size + 1
        return TileChunk(
            block.long(), past.clamp(0, self.block_size) * member, tiles, self.tile_tokens, Sq
        )


class TileChunk(NamedTuple):
    """Several tiles: ``slots [n, W]`` name blocks, ``seen [n, T, W]`` counts their visible keys."""

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
        """Spell out which gathered keys each token sees: bool ``[n, T, W * block_size]``."""
        block_size = gathered.shape[1] // self.slots.shape[1]
        offset = torch.arange(block_size, device=self.seen.device)
        return (offset < self.seen[..., None]).flatten(2)

    def weigh(self, weights: Tensor, values: Tensor, finite: bool) -> Tensor:
        """Sum the gathered values by ``weights [n, T * G, W * block_size]``.

        A product multiplies unseen values by zero, and 0 x nan is nan: where values are not finite,
        they are left out of the product and given only to the rows that see them.
        """
        if finite:
            return weights @ values
        out = weights @ values.nan_to_num(0.0, 0.0, 0.0)
        seen = self.sees(values).to(weights.dtype)
        for special in (torch.inf, -torch.inf, torch.nan):
            is_special = values.isnan() if special != special else values == special
            reached = (seen @ is_special.to(weights.dtype) > 0)[:, :, None]  # [n, T, 1, D]
            out.unflatten(1, (seen.shape[1], -1)).add_(torch.where(reached, special, 0.0))
        return out

    def used(self) -> Tensor:
        """Which slots some token sees a key of: bool ``[n, W]``."""
        return self.seen.amax(1) > 0
