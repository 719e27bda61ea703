"""Attend from tiles of queries to their listed blocks, with gradients, on any device."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_SCORES = 2 << 20  # scores held at a time, over all tiles of a chunk


@torch.library.custom_op("infllm_flex::attend_blocks", mutates_args=())
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    words: Tensor,
    full_num: Tensor,
    full_idx: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys of its own blocks, causally.

    Gathers the union of a tile's blocks and masks each token's own choice within it, a chunk of
    tiles at a time, so memory beside the result does not grow with the length.

    Args:
        q: Queries ``[B, Hq, Sq, D]``, the last ``Sq`` of ``Skv`` positions.
        k: Keys ``[B, Hkv, Skv, D]``.
        v: Values ``[B, Hkv, Skv, D]``.
        kv_num: Partial blocks per tile, int32 ``[B, Hkv, Nq]``; this and the next four as
            ``tile_blocks`` returns them.
        kv_idx: The partial blocks, int32 ``[B, Hkv, Nq, W]``.
        words: Their membership words, int32 ``[B, Hkv, Nq, W]``.
        full_num: Full blocks per tile, int32 ``[B, Hkv, Nq]``.
        full_idx: The full blocks, int32 ``[B, Hkv, Nq, W]``.
        block_size: Keys per block.
        tile_tokens: Tokens per tile.
        scale: Factor on the dot products.

    Returns:
        Output ``[B, Hq, Sq, D]`` in the dtype of ``q``, and its natural log-sum-exp, at least
        float32 ``[B, Hq, Sq]``. A query with no key has output 0 and log-sum-exp -inf.
        Gradients flow to q, k and v through the output, none through the log-sum-exp.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=accumulate)
    lists = _Lists(kv_num, kv_idx, words, full_num, full_idx, block_size, tile_tokens)
    for head in _heads(q, k, v):
        keys, values = (head.blocks(x, block_size, accumulate) for x in (k, v))
        for chunk in lists.chunks(head, k.shape[2], q.shape[2]):
            rows = chunk.load(head, q, accumulate) * scale
            logits = chunk.logits(rows, keys)
            peak = logits.amax(-1, keepdim=True)
            peak.masked_fill_(peak == -torch.inf, 0.0)  # no key: exp(-inf - 0) = 0, not nan
            weights = logits.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            result = chunk.weigh(weights, values) / total.masked_fill(total == 0, 1.0)
            chunk.store(head, out, result)
            chunk.store(head, lse[..., None], peak + total.log())
    return out, lse


@torch.library.custom_op("infllm_flex::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    words: Tensor,
    full_num: Tensor,
    full_idx: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attend_blocks``, recomputing the weights chunk by chunk.

    Args:
        grad_out: Gradient of the output ``[B, Hq, Sq, D]``.
        q: As in ``attend_blocks``, like every argument not listed here.
        out: The output of ``attend_blocks``.
        lse: Its log-sum-exp.

    Returns:
        Gradients of q, k and v, in their shapes and dtypes.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    lists = _Lists(kv_num, kv_idx, words, full_num, full_idx, block_size, tile_tokens)
    Skv, D = k.shape[2:]
    for head in _heads(q, k, v):
        keys, values = (head.blocks(x, block_size, accumulate) for x in (k, v))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for chunk in lists.chunks(head, Skv, q.shape[2]):
            rows = chunk.load(head, q, accumulate) * scale
            drows = chunk.load(head, grad_out, accumulate)
            row_lse = chunk.load(head, lse[..., None], accumulate)
            row_lse = row_lse.masked_fill(row_lse == -torch.inf, 0.0)
            correction = (drows * chunk.load(head, out, accumulate)).sum(-1, keepdim=True)
            weights = chunk.logits(rows, keys).sub_(row_lse).exp_()
            gathered = values[chunk.slots].flatten(1, 2)
            chunk.add_to_blocks(dvalues, weights.mT @ drows)
            dlogits = (drows @ gathered.mT).sub_(correction).mul_(weights)
            chunk.add_to_blocks(dkeys, dlogits.mT @ rows)
            chunk.store(head, dq, dlogits @ keys[chunk.slots].flatten(1, 2) * scale)
        dk[head.batch, head.kv] = dkeys.flatten(0, 1)[:Skv]
        dv[head.batch, head.kv] = dvalues.flatten(0, 1)[:Skv]
    return dq, dk, dv


class _Head(NamedTuple):
    """One key/value head of one batch entry, and the query heads that share it."""

    batch: int
    kv: int
    group: slice

    def blocks(self, x: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
        """Cut ``x [B, Hkv, Skv, D]`` into ``[Nkv, block_size, D]``; the last one zero-filled."""
        x = x[self.batch, self.kv].to(dtype)
        return F.pad(x, (0, 0, 0, -x.shape[0] % block_size)).unflatten(0, (-1, block_size))


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Head]:
    G = q.shape[1] // k.shape[1]
    for batch in range(k.shape[0]):
        for kv in range(k.shape[1]):
            yield _Head(batch, kv, slice(kv * G, (kv + 1) * G))


class _Lists(NamedTuple):
    kv_num: Tensor
    kv_idx: Tensor
    words: Tensor
    full_num: Tensor
    full_idx: Tensor
    block_size: int
    tile_tokens: int

    def chunks(self, head: _Head, Skv: int, Sq: int) -> Iterator["_Chunk"]:
        """Walk a head's tiles, several at a time, their lists joined and padded to one width."""
        at = (head.batch, head.kv)
        kv_num, full_num = self.kv_num[at], self.full_num[at]
        counts = (kv_num + full_num).tolist()
        group = head.group.stop - head.group.start
        per_slot = self.tile_tokens * group * self.block_size
        begin = 0
        while begin < len(counts):
            width, end = counts[begin], begin + 1
            while end < len(counts):
                wider = max(width, counts[end])
                if (end + 1 - begin) * wider * per_slot > _CHUNK_SCORES:
                    break
                width, end = wider, end + 1
            tiles = slice(begin, end)
            yield self._join(at, tiles, max(width, 1), Skv, Sq)
            begin = end

    def _join(self, at: tuple[int, int], tiles: slice, width: int, Skv: int, Sq: int) -> "_Chunk":
        num, full_num = self.kv_num[at][tiles, None], self.full_num[at][tiles, None]
        kv_idx, words, full_idx = (x[at][tiles] for x in (self.kv_idx, self.words, self.full_idx))
        slot = torch.arange(width, device=num.device)
        is_full = slot < full_num
        is_partial = ~is_full & (slot < full_num + num)
        from_full = slot.clamp(max=full_idx.shape[-1] - 1).expand_as(is_full)
        from_partial = (slot - full_num).clamp(0, kv_idx.shape[-1] - 1)
        block = torch.where(
            is_full, full_idx.gather(1, from_full), kv_idx.gather(1, from_partial)
        ).masked_fill_(~(is_full | is_partial), 0)  # [n, W]
        word = words.gather(1, from_partial).masked_fill_(~is_partial, 0).masked_fill_(is_full, -1)

        token = torch.arange(self.tile_tokens, device=num.device)
        first = Skv - Sq + torch.arange(tiles.start, tiles.stop, device=num.device) * token.numel()
        position = first[:, None] + token  # [n, T]
        member = (word[:, None] >> token[:, None]) & 1  # [n, T, W]
        past = position[:, :, None] - block[:, None] * self.block_size + 1
        return _Chunk(
            block.long(), past.clamp(0, self.block_size) * member, tiles, self.tile_tokens, Sq
        )


class _Chunk(NamedTuple):
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

    def load(self, head: _Head, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Read rows of ``x [B, Hq, Sq, E]`` as ``[n, T * G, E]``, zero beyond the sequence."""
        rows = x[head.batch, head.group, self._tokens()].to(dtype).transpose(0, 1)  # [tokens, G, E]
        missing = self.slots.shape[0] * self.tile_tokens - rows.shape[0]
        rows = F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows
        return rows.reshape(self.slots.shape[0], -1, x.shape[-1])

    def store(self, head: _Head, out: Tensor, rows: Tensor) -> None:
        """Write ``rows [n, T * G, E]`` back to ``out [B, Hq, Sq, E]``."""
        at = self._tokens()
        G = head.group.stop - head.group.start
        rows = rows.reshape(-1, G, rows.shape[-1])[: at.stop - at.start]
        out[head.batch, head.group, at] = rows.transpose(0, 1).to(out.dtype)

    def logits(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Dot products with the gathered keys ``[n, T * G, W * block_size]``, -inf if unseen."""
        logits = rows @ keys[self.slots].flatten(1, 2).mT
        unseen = ~self.sees(keys.shape[1])
        logits.unflatten(1, (unseen.shape[1], -1)).masked_fill_(unseen[:, :, None], -torch.inf)
        return logits

    def sees(self, block_size: int) -> Tensor:
        """Spell out which gathered keys each token sees: bool ``[n, T, W * block_size]``."""
        offset = torch.arange(block_size, device=self.seen.device)
        return (offset < self.seen[..., None]).flatten(2)

    def weigh(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sum the gathered values by ``weights [n, T * G, W * block_size]``.

        A product multiplies unseen values by zero, and 0 x nan is nan: where values are not finite,
        they are left out of the product and given only to the rows that see them.
        """
        gathered = values[self.slots].flatten(1, 2)  # [n, W * block_size, D]
        if gathered.isfinite().all():
            return weights @ gathered
        out = weights @ gathered.nan_to_num(0.0, 0.0, 0.0)
        seen = self.sees(values.shape[1]).to(weights.dtype)
        for special in (torch.inf, -torch.inf, torch.nan):
            is_special = gathered.isnan() if special != special else gathered == special
            reached = (seen @ is_special.to(weights.dtype) > 0)[:, :, None]  # [n, T, 1, D]
            out.unflatten(1, (seen.shape[1], -1)).add_(torch.where(reached, special, 0.0))
        return out

    def add_to_blocks(self, total: Tensor, rows: Tensor) -> None:
        """Add ``rows [n, W * block_size, D]`` onto the blocks they belong to."""
        used = self.seen.amax(1) > 0
        parts = rows.unflatten(1, (-1, total.shape[1]))[used]
        total.index_add_(0, self.slots[used], parts)


@attend_blocks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    words: Tensor,
    full_num: Tensor,
    full_idx: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulate)


@attend_blocks.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    words: Tensor,
    full_num: Tensor,
    full_idx: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from custom_ops.kernels.attend_blocks import launch

    lists = (kv_num, kv_idx, words, full_num, full_idx)
    return launch(q, k, v, *lists, block_size, tile_tokens, scale)


@attend_blocks_backward.register_kernel("cuda")
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    words: Tensor,
    full_num: Tensor,
    full_idx: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from custom_ops.kernels.attend_blocks_backward import launch

    lists = (kv_num, kv_idx, words, full_num, full_idx)
    return launch(grad_out, q, k, v, out, lse, *lists, block_size, tile_tokens, scale)


@attend_blocks_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple):
    *tensors, block_size, tile_tokens, scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors[:3], out, lse, *tensors[3:])
    ctx.settings = (block_size, tile_tokens, scale)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor, grad_lse: Tensor):
    grads = attend_blocks_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None,) * 8


attend_blocks.register_autograd(_backward, setup_context=_save_for_backward)
