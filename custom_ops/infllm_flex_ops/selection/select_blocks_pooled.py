"""Select the blocks of keys that each query attends to, by one pooled query per group."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_in_tiles import select_in_tiles
from infllm_flex_ops.transforms import register_vmap


@define_operator()
def select_blocks_pooled(
    q: Tensor,
    compressed: Tensor,
    kv_len: int,
    window: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    documents: Tensor | None = None,
) -> Tensor:
    """Select the blocks with the best dot products of a pooled query with their compressed keys.

    One query orders blocks by its dot products alone, so it needs neither a scale nor a normaliser.
    A row's bits depend only on its position and on the keys it sees.

    Args:
        q: Pooled queries ``[B, Hkv, Sq, D]``, the last ``Sq`` of ``kv_len`` positions.
        compressed: Compressed keys ``[B, Hkv, C, D]`` of windows of ``window`` tokens that follow
            each other without a gap, in the dtype of ``q``; the keys themselves for windows of one.
        kv_len: Keys in the sequence.
        window: Pooling window of the compressed keys, in tokens.
        block_size: Keys per block, a multiple of ``window``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        documents: The sequences of a padded or packed batch, as in ``select_blocks``.

    Returns:
        Selected blocks, int32 ``[B, Hkv, Sq, K]`` with ``K = min(num_selected, Nkv)``, ascending,
        unused slots last as -1. Ties go to the lower block; a NaN ranks below every number.
        No gradient flows.

    Raises:
        ValueError: ``documents`` does not cut the positions into equal parts, or the queries start
            within a part.
    """
    if q.dtype == torch.float8_e4m3fn:  # a storage format: PyTorch does no arithmetic in it
        q, compressed = q.float(), compressed.float()
    rule = SelectionRule.from_pooled(window, block_size, init_blocks, local_blocks, num_selected)
    groups = q[:, :, :, None]  # [B, Hkv, Sq, 1, D]
    return select_in_tiles(groups, compressed, None, kv_len, rule, 1.0, documents)


register_vmap(select_blocks_pooled)


@select_blocks_pooled.register_fake
def _(q: Tensor, compressed: Tensor, kv_len: int, *rest: Any) -> Tensor:
    rule = SelectionRule.from_pooled(*rest[:5])
    return q.new_empty(*q.shape[:3], rule.num_slots(kv_len), dtype=torch.int32)


def _pack(*args: Any) -> tuple[Any, ...]:
    return *args[:3], SelectionRule.from_pooled(*args[3:8]), *args[8:]


cuda_launcher(select_blocks_pooled, "selection.kernels.prefill.launch_pooled", pack=_pack)
