"""A decode step of one token per row on the CPU, where every call counts; no operator itself."""

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.attend_cached_blocks import attend_to_lists, visible_lists
from infllm_flex_ops.dispatch import without_autocast
from infllm_flex_ops.selection.block_scores import Rule, Windows, pick_lists
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
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    dense_len: int,
    scale: float,
) -> Tensor:
    """Attend to what is selected, bit for bit as by the two operators one after the other.

    The choice stays in Python lists, and no tensor of it is made and read again. For one query per
    row, ``q [B, Hq, 1, D]``; all else is as in ``select_cached_blocks`` and
    ``attend_cached_blocks``.
    """
    rule = Rule(
        Windows(kernel_size, kernel_stride),
        Windows(coarse_size, coarse_stride),
        block_size,
        init_blocks,
        local_blocks,
        scale,
    )
    outs = []
    for b, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        position = last - first - 1
        own = position // block_size
        if position + 1 < dense_len or own < num_selected:
            chosen = [list(range(own + 1))] * len(k[b])
        else:
            here = range(position, position + 1)
            scores = score_blocks(q[b], compressed[b], coarse[b], here, rule)
            chosen = pick_lists(scores[:, 0], position, num_selected, rule)
        lists = visible_lists(chosen, position, block_size)
        outs.append(attend_to_lists(q[b, :, 0], k[b], v[b], lists, first, block_size, scale))
    return torch.stack(outs)[:, :, None]
