"""Select the blocks of keys that each query attends to."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_in_tiles import select_in_tiles
from infllm_flex_ops.transforms import register_vmap


@define_operator()
def select_blocks(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    kv_len: int,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    scale: float,
    documents: Tensor | None = None,
) -> Tensor:
    """Select the best blocks of every query by their compressed keys, shared by its query group.

    A row's bits depend only on its position and on the keys it sees: queries are scored in tiles
    that start at fixed positions and have fixed shapes, whatever the batch, the chunk or the
    length.

    Args:
        q: Queries ``[B, Hq, Sq, D]``, the last ``Sq`` of ``kv_len`` positions.
        compressed: Compressed keys ``[B, Hkv, C, D]`` of windows of ``kernel_size`` tokens every
            ``kernel_stride``.
        coarse: Coarse keys ``[B, Hkv, C2, D]`` of windows of ``coarse_size`` tokens every
            ``coarse_stride``; their log-sum-exp normalises the scores. Given the compressed keys
            again, the normaliser is exact.
        kv_len: Keys in the sequence.
        kernel_size: Pooling window of the compressed keys, in tokens.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens.
        coarse_stride: Step between their windows, in tokens.
        block_size: Keys per block, a multiple of ``kernel_stride``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        scale: Factor on the dot products.
        documents: The sequences of a padded or packed batch, int32 ``[B, N, 3]``. The ``kv_len``
            positions are cut into N equal parts; no part holds tokens of two sequences, and the
            queries start with a part. Row n is (start, end, budget) of the sequence that part n
            belongs to, or zeros for padding. A sequence starts at a multiple of ``coarse_stride``
            and ``block_size``, its budget is at most ``num_selected``, and its queries see only
            their own sequence: its first blocks are the ``init_blocks``. Padding selects nothing.

    Returns:
        Selected blocks, int32 ``[B, Hkv, Sq, K]`` with ``K = min(num_selected, Nkv)``, ascending,
        unused slots last as -1. Ties go to the lower block; a NaN score counts as zero.
        No gradient flows.

    Raises:
        ValueError: ``documents`` does not cut the positions into equal parts, or the queries start
            within a part.

    Source: arXiv 2509.24663, section 3; stage 1 of OpenBMB/infllmv2_cuda_impl.
    """
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
    groups = q.unflatten(1, (compressed.shape[1], -1)).transpose(2, 3)  # [B, Hkv, Sq, G, D]
    return select_in_tiles(groups, compressed, coarse, kv_len, rule, scale, documents)


register_vmap(select_blocks)


@select_blocks.register_fake
def _(q: Tensor, compressed: Tensor, coarse: Tensor, kv_len: int, *rest: Any) -> Tensor:
    K = SelectionRule.split(rest)[0].num_slots(kv_len)
    return q.new_empty(q.shape[0], compressed.shape[1], q.shape[2], K, dtype=torch.int32)


def _pack(*args: Any) -> tuple[Any, ...]:
    rule, others = SelectionRule.split(args[4:])
    return *args[:4], rule, *others


cuda_launcher(select_blocks, "selection.kernels.prefill.launch", pack=_pack)
