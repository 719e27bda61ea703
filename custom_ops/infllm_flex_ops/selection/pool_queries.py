"""Average the queries of each group, to score blocks with one query per group."""

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.rotary_dims import slowest_dims
from infllm_flex_ops.transforms import register_vmap


@define_operator()
def pool_queries(q: Tensor, num_kv_heads: int, float8: bool, num_dims: int) -> Tensor:
    """Average the query heads that share a KV head, in at least float32.

    The bits of a token depend on its queries alone.

    For ``float8`` a pooled query is scaled by the power of two that brings its largest number
    between 128 and 256. The order of its dot products does not change, nothing overflows and little
    underflows.

    Args:
        q: Queries ``[B, Hq, S, D]``.
        num_kv_heads: ``Hkv``, which divides ``Hq``.
        float8: Round to e4m3 instead of to the dtype of ``q``.
        num_dims: Head dims to pool, those that a rotary embedding turns slowest, an even number; D
            pools all.

    Returns:
        Pooled queries ``[B, Hkv, S, num_dims]``, contiguous, in the dtype of ``q`` or
        ``float8_e4m3fn``. No gradient flows.
    """
    pooled = _average_heads(slowest_dims(q, num_dims).unflatten(1, (num_kv_heads, -1)))
    if not float8:
        return pooled.to(q.dtype).contiguous()
    exponent = torch.frexp(pooled.abs().amax(-1, keepdim=True)).exponent  # largest < 2 ** exponent
    return round_to_float8(torch.ldexp(pooled, 8 - exponent)).contiguous()


def _average_heads(heads: Tensor) -> Tensor:
    """Average ``heads [B, Hkv, G, S, D]``, added one by one as kernels do: ``[B, Hkv, S, D]``.

    The order in which PyTorch's ``mean`` adds depends on the other tokens and on the layout.
    """
    first, *others = heads.unbind(2)
    total = first.to(torch.promote_types(heads.dtype, torch.float32), copy=True)
    for head in others:
        total += head
    return total.div_(heads.shape[2])


def round_to_float8(x: Tensor) -> Tensor:
    """Round to e4m3, if ``x`` is not. It has no infinity: larger numbers become the largest one."""
    if x.dtype == torch.float8_e4m3fn:
        return x
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn)


@pool_queries.register_fake
def _(q: Tensor, num_kv_heads: int, float8: bool, num_dims: int) -> Tensor:
    B, _, S, _ = q.shape
    dtype = torch.float8_e4m3fn if float8 else q.dtype
    return q.new_empty(B, num_kv_heads, S, num_dims, dtype=dtype)


cuda_launcher(pool_queries, "selection.kernels.pool_queries")


register_vmap(pool_queries)
