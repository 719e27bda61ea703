"""Choose the blocks of keys that each query attends to, by one pooled query per group."""

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.block_scores import Rule, Windows
from infllm_flex_ops.selection.select_blocks import check_parts, list_sequences, select_in_sequence
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
    """Pick the blocks with the best dot products of a pooled query with their compressed keys.

    One query orders blocks by its dot products alone, so neither a scale nor a normaliser plays a
    part. A row's bits depend on its position and on what it sees alone.

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
        unused slots last as -1. Ties go to the lower block; a nan ranks below every number.
        No gradient flows.

    Raises:
        ValueError: if ``documents`` does not tell of equal parts, or the queries start within one.
    """
    B, Hkv, Sq, _ = q.shape
    check_parts(documents, kv_len, Sq)
    if q.dtype == torch.float8_e4m3fn:  # for storage only: no arithmetic knows it
        q, compressed = q.float(), compressed.float()
    K = min(num_selected, -(-kv_len // block_size))
    selected = torch.empty(B, Hkv, Sq, K, dtype=torch.int32, device=q.device)
    windows = Windows(window, window)
    rule = Rule(windows, windows, block_size, init_blocks, local_blocks, 1.0)
    if documents is not None:
        selected.fill_(-1)
    for b in range(B):
        for sequence in list_sequences(documents, b, kv_len, K):
            for h in range(Hkv):
                select_in_sequence(
                    q[b, h, :, None],  # [Sq, 1, D]
                    compressed[b, h],
                    None,
                    kv_len - Sq,
                    sequence,
                    rule,
                    selected[b, h],
                )
    return selected


@select_blocks_pooled.register_fake
def _(
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
    K = torch.sym_min(num_selected, (kv_len + block_size - 1) // block_size)
    return q.new_empty(*q.shape[:3], K, dtype=torch.int32)


cuda_launcher(select_blocks_pooled, "selection.kernels.select_blocks.pooled")


register_vmap(select_blocks_pooled)
