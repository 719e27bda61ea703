"""Attend from the queries of a decode step to their blocks of a key/value cache."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.rows import check_room
from infllm_flex_ops.transforms import refuse_gradients


@define_operator()
def attend_cached_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    start: Tensor,
    end: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """Softmax attention of few queries per row over the keys of their own blocks, causally.

    Only the listed blocks of the cache are read: not the padding before a row, nor the unused tail
    of a preallocated cache. They are cast to the dtype of ``q`` as they are read, so that a cache
    of another dtype, as autocast leaves it, needs no copy. Not differentiable.

    Args:
        q: Queries ``[B, Hq, n, D]``, the last ``n`` tokens of their rows.
        k: Cache of keys ``[B, Hkv, S, D]``, including those of the queries' own tokens.
        v: Cache of values ``[B, Hkv, S, D]``.
        selected: Blocks, int32 ``[B, Hkv, n, W]``, ascending, -1 for unused slots. Block 0 begins
            at the row's first token.
        start: Cache slot of each row's first token, int64 ``[B]``.
        end: One past the slot of each row's last token, int64 ``[B]``.
        block_size: Keys per block.
        scale: Factor on the dot products.

    Returns:
        ``[B, Hq, n, D]`` in the dtype of ``q``; 0 for a query without blocks.

    Raises:
        ValueError: A row is longer than the cache. This is checked on the CPU only.
    """
    B, Hq, n, D = q.shape
    outs = []
    for b, (row_start, row_end) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        check_room(b, row_end, k.shape[2])
        for i in range(n):
            position = row_end - n + i - row_start
            lists = visible_lists(selected[b, :, i].tolist(), position, block_size)
            out = attend_to_lists(q[b, :, i], k[b], v[b], lists, row_start, block_size, scale)
            outs.append(out)
    return torch.stack(outs).view(B, n, Hq, D).transpose(1, 2).contiguous()


@attend_cached_blocks.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


cuda_launcher(attend_cached_blocks, "block_attention.kernels.attend_cached_blocks")


refuse_gradients(
    attend_cached_blocks,
    "attend_cached_blocks is not differentiable: to train, attend without a cache",
)


class VisibleList(NamedTuple):
    """The blocks that a query sees under one KV head, and how many of their keys it sees."""

    blocks: list[int]
    num_keys: int


def visible_lists(lists: list[list[int]], position: int, block_size: int) -> list[VisibleList]:
    """Remove unused slots, and blocks that a query at ``position`` does not see, from its lists."""
    visible = []
    for listed in lists:
        blocks = [block for block in listed if 0 <= block * block_size <= position]
        num_keys = sum(min(block_size, position + 1 - block * block_size) for block in blocks)
        visible.append(VisibleList(blocks, num_keys))
    return visible


def attend_to_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: list[VisibleList],
    row_start: int,
    block_size: int,
    scale: float,
) -> Tensor:
    """Attend from one query ``[Hq, D]`` to the lists of its KV heads; block 0 is at ``row_start``.

    All heads are computed at once if they see the same number of keys. The lists of
    ``select_cached_blocks`` fulfil that.
    """
    Hq, D = q.shape
    num_keys = {one.num_keys for one in lists}
    if len(num_keys) > 1:
        heads = zip(q.chunk(len(lists)), k.split(1), v.split(1), lists, strict=True)
        outs = [
            attend_to_lists(one_q, one_k, one_v, [own], row_start, block_size, scale)
            for one_q, one_k, one_v, own in heads
        ]
        return torch.cat(outs)
    (count,) = num_keys
    if count == 0:
        return torch.zeros_like(q)
    block_slots = torch.tensor(
        [[row_start + block * block_size for block in one.blocks] for one in lists]
    )
    slots = (block_slots[:, :, None] + torch.arange(block_size)).flatten(1)[:, :count]
    keys, values = _gather(k, slots), _gather(v, slots)
    if not k.dtype == v.dtype == q.dtype:
        keys, values = keys.to(q.dtype), values.to(q.dtype)
    rows = q.reshape(1, len(lists), -1, D)
    out = F.scaled_dot_product_attention(rows, keys, values, scale=scale)
    return out.view(Hq, D)


def _gather(x: Tensor, slots: Tensor) -> Tensor:
    """Copy the rows ``slots [H, L]`` of ``x [H, S, D]``: ``[1, H, L, D]``."""
    H, S, D = x.shape
    head_stride, row_stride, _ = x.stride()
    if H > 1 and (not row_stride or head_stride % row_stride):
        return torch.stack([x[h].index_select(0, slots[h]) for h in range(H)])[None]
    rows_per_head = head_stride // row_stride if H > 1 else 0
    rows = x.as_strided(((H - 1) * rows_per_head + S, D), x.stride()[1:])
    index = slots
    if rows_per_head:
        index = slots + torch.arange(0, H * rows_per_head, rows_per_head)[:, None]
    return rows.index_select(0, index.flatten()).view(1, H, -1, D)
