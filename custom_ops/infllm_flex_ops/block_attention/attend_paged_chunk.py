"""Attend from many queries of one row to their blocks of a cache in pages."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.attend_blocks import attend_blocks
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.pages import gather_tokens
from infllm_flex_ops.transforms import refuse_gradients


@define_operator()
def attend_paged_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    table: Tensor,
    kv_len: int,
    block_size: int,
    scale: float,
) -> Tensor:
    """Attend from a row's last tokens, as ``attend_blocks`` does, to keys in pages.

    Not differentiable.

    Args:
        q: Queries ``[Sq, Hq, D]``, the last ``Sq`` of ``kv_len`` tokens.
        k: Pages of keys ``[P, Hkv, page, D]``, including those of the queries' own tokens. Slots
            beyond the row's length, or in other rows' pages, may hold anything.
        v: Pages of values ``[P, Hkv, page, D]``.
        selected: Blocks of each query, int32 ``[Hkv, Sq, K]``, ascending, -1 for unused slots.
        table: The row's pages in order, int32 ``[max_pages]``.
        kv_len: Tokens of the row.
        block_size: Keys per block.
        scale: Factor on the dot products.

    Returns:
        ``[Sq, Hq, D]`` in the dtype and layout of ``q``; 0 for a query without blocks.
    """
    keys, values = (gather_tokens(x, table, 0, kv_len)[None] for x in (k, v))
    queries = q.transpose(0, 1)[None]
    out, _ = attend_blocks(queries, keys, values, selected[None], block_size, scale)
    return out[0].transpose(0, 1)


@attend_paged_chunk.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    # As the definition makes it: the layouts differ where queries share memory.
    return torch.empty_like(q.transpose(0, 1)[None])[0].transpose(0, 1)


cuda_launcher(attend_paged_chunk, "block_attention.kernels.attend_blocks", "launch_paged")


refuse_gradients(
    attend_paged_chunk,
    "attend_paged_chunk is not differentiable: to train, attend without a cache",
)
