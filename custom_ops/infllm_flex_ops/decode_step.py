"""A decode step of one token per row on the CPU, where every call counts; no operator itself."""

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.attend_cached_blocks import attend_to_lists, visible_lists
from infllm_flex_ops.dispatch import without_autocast
from infllm_flex_ops.rows import check_room
from infllm_flex_ops.selection.block_scores import topk_lists
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_cached_blocks import score_blocks


@without_autocast
def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    start: Tensor,
    end: Tensor,
    rule: SelectionRule,
    dense_len: int,
    scale: float,
) -> Tensor:
    """Select blocks and attend to them, with the bits of the two operators one after the other.

    The selection stays in Python lists: no tensor of it is made and read again.

    Args:
        q: Queries ``[B, Hq, 1, D]``, the last token of each row.
        k: Cache of keys ``[B, Hkv, S, D]``.
        v: Cache of values ``[B, Hkv, S, D]``.
        compressed: Compressed keys, as in ``select_cached_blocks``.
        coarse: Coarse keys, as in ``select_cached_blocks``.
        start: Cache slot of each row's first token, int64 ``[B]``.
        end: One past the slot of each row's last token, int64 ``[B]``.
        rule: Settings of the selection.
        dense_len: A row with fewer tokens attends to all blocks.
        scale: Factor on the dot products.

    Returns:
        ``[B, Hq, 1, D]``.

    Raises:
        ValueError: A row is longer than the cache.
    """
    outs = []
    for b, (row_start, row_end) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        check_room(b, row_end, k.shape[2])
        position = row_end - row_start - 1
        own = position // rule.block_size
        if position + 1 < dense_len or own < rule.num_selected:
            selected = [list(range(own + 1))] * len(k[b])
        else:
            at = range(position, position + 1)
            scores = score_blocks(q[b], compressed[b], coarse[b], at, rule, scale)
            selected = topk_lists(scores[:, 0], position, rule.num_selected, rule)
        lists = visible_lists(selected, position, rule.block_size)
        out = attend_to_lists(q[b, :, 0], k[b], v[b], lists, row_start, rule.block_size, scale)
        outs.append(out)
    return torch.stack(outs)[:, :, None]
