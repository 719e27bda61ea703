"""A decode step of one token per row: append it, select its blocks, and attend to them."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.attend_cached_blocks import attend_to_lists, visible_lists
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.append_windows import append_windows
from infllm_flex_ops.selection.block_scores import topk_lists
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_cached_blocks import score_blocks
from infllm_flex_ops.transforms import refuse_gradients


@define_operator(mutates_args=("compressed", "coarse", "start", "end"))
def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    start: Tensor,
    end: Tensor,
    new_start: Tensor | None,
    new_end: Tensor | None,
    num_new: int,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    dense_len: int,
    width: int,
    scale: float,
) -> Tensor:
    """Do what ``append_windows``, ``select_cached_blocks`` and ``attend_cached_blocks`` do in turn.

    One operator is faster than three: on a GPU by the launches between them, on a CPU because the
    selection stays in Python lists, of which no tensor is made.

    Args:
        q: Queries ``[B, Hq, 1, D]``, the last token of each row.
        k: Cache of keys ``[B, Hkv, S, D]`` that holds the new ones.
        v: Cache of values ``[B, Hkv, S, D]``.
        compressed: Compressed keys ``[B, Hkv, C, D]``, as in ``append_windows``.
        coarse: Coarse keys ``[B, Hkv, C2, D]``; None if the compressed keys normalise the scores.
        start: Cache slot of each row's first token, int64 ``[B]``.
        end: One past the slot of each row's last token, int64 ``[B]``; grows by ``num_new``.
        new_start: New value of ``start``, integers that broadcast to it; None to keep it.
        new_end: New value of ``end``, integers that broadcast to it; None to add ``num_new``.
        num_new: Number of new slots; 0 if all are appended already.
        kernel_size: Pooling window of the compressed keys, in tokens, a multiple of the step.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens; ``kernel_size`` without them.
        coarse_stride: Step between their windows, in tokens; ``kernel_stride`` without them.
        block_size: Keys per block, a multiple of ``kernel_stride``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        dense_len: A row with fewer tokens than this attends to all of its blocks.
        width: Slots of the longest list: the budget, or the blocks of the longest dense row.
        scale: Factor on the dot products.

    Returns:
        ``[B, Hq, 1, D]`` in the dtype of ``q``; 0 for a row without tokens. On the CPU it has the
        bits of the three operators. On a GPU the choice is theirs, and the sums may be rounded
        otherwise.

    Raises:
        ValueError: There is more than one query per row. The cache or its windows are too short for
            ``end``; this is checked on the CPU only.
    """
    if q.shape[2] != 1:
        raise ValueError(f"q must hold one query per row, [B, Hq, 1, D], got {tuple(q.shape)}")
    rule = SelectionRule(
        kernel_size,
        kernel_stride,
        coarse_size,
        coarse_stride,
        block_size,
        init_blocks,
        local_blocks,
        num_selected,
    )
    if num_new or new_start is not None or new_end is not None:
        sizes = (*rule.windows, *rule.coarse_windows)
        append_windows.plain(  # type: ignore[attr-defined]
            k, compressed, coarse, start, end, new_start, new_end, num_new, *sizes
        )
    coarse = compressed if coarse is None else coarse
    outs = []
    for b, (row_start, row_end) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        position = row_end - row_start - 1
        own = position // block_size
        if position + 1 < dense_len or own < num_selected:
            selected = [list(range(own + 1))] * len(k[b])
        else:
            at = range(position, position + 1)
            scores = score_blocks(q[b], compressed[b], coarse[b], at, rule, scale)
            selected = topk_lists(scores[:, 0], position, num_selected, rule)
        lists = visible_lists(selected, position, block_size)
        out = attend_to_lists(q[b, :, 0], k[b], v[b], lists, row_start, block_size, scale)
        outs.append(out)
    return torch.stack(outs)[:, :, None]


@decode_step.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


def _pack(*args: Any) -> tuple[Any, ...]:
    rule, others = SelectionRule.split(args[10:])
    return *args[:10], rule, *others


cuda_launcher(decode_step, "block_attention.kernels.decode_step", pack=_pack)


refuse_gradients(
    decode_step,
    "decode_step is not differentiable: to train, attend without a cache",
)
