"""Triton kernel of ``pool_queries``, and the rounding that the scoring kernels share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.device import knows_float8
from infllm_flex_ops.selection.kernels.rotary_dims import slowest_dim
from infllm_flex_ops.triton_common.tensor_args import view

_ROWS = 8  # tokens of a program


@triton.jit
def average_heads(q_ptr, stride_h, mask, G: tl.constexpr):
    """Average ``G`` heads in float32; ``q_ptr`` points at the elements of the first."""
    total = tl.load(q_ptr, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, G):
        q_ptr += stride_h
        total += tl.load(q_ptr, mask=mask, other=0.0).to(tl.float32)
    return total / G


@triton.jit
def fit_float8(x):
    """Scale each float32 row by a power of two, so that its largest number is 128 to 256."""
    largest = tl.max(tl.abs(x), 1)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    # 2 ** (134 - exponent), which is a normal number for all but the tiniest rows.
    factor = (261 - tl.maximum(exponent, 7)) << 23
    return x * factor.to(tl.float32, bitcast=True)[:, None]


@triton.jit
def round_like_float8(x):
    """Round float32 to the numbers of e4m3, ties to even; larger numbers become 448.

    Arithmetic does it, since not every GPU converts to the type.
    """
    x = tl.minimum(tl.maximum(x, -448.0), 448.0, propagate_nan=tl.PropagateNan.ALL)
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000  # three bits after the leading one
    small = (x + 24576.0) - 24576.0  # below 2 ** -6 steps of 2 ** -9
    return tl.where(tl.abs(x) < 0.015625, small, normal.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["S"])
def _pool_kernel(
    q,
    out_ptr,
    S,
    Hkv,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Average ``D`` head dims of a group for ``ROWS`` tokens into ``out [B * Hkv, S, D]``."""
    tiles = tl.cdiv(S, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < S)[:, None] & (d < D)[None, :]
    q_head = head // Hkv * q.b + head % Hkv * G * q.h
    at = row.to(tl.int64)[:, None] * q.s + slowest_dim(d, D, HEAD_DIM)[None, :] * q.d
    x = average_heads(q.ptr + q_head + at, q.h, mask, G)
    if FLOAT8:
        x = round_like_float8(fit_float8(x))
    out = (head * S + row)[:, None] * D + d[None, :]
    tl.store(out_ptr + out, x.to(out_ptr.dtype.element_ty), mask=mask)


def launch(q: Tensor, num_kv_heads: int, float8: bool, num_dims: int) -> Tensor:
    """Average and round in one pass over the queries."""
    B, Hq, S, D = q.shape
    # Half precision holds every number of e4m3.
    dtype = q.dtype if not float8 else torch.float8_e4m3fn if knows_float8(q) else torch.float16
    out = torch.empty(B, num_kv_heads, S, num_dims, dtype=dtype, device=q.device)
    if out.numel():
        _pool_kernel[(B * num_kv_heads * triton.cdiv(S, _ROWS),)](
            q=view(q),
            out_ptr=out,
            S=S,
            Hkv=num_kv_heads,
            G=Hq // num_kv_heads,
            D=num_dims,
            BLOCK_D=triton.next_power_of_2(num_dims),
            HEAD_DIM=D,
            ROWS=_ROWS,
            FLOAT8=float8,
            num_warps=4,
        )
    return out.to(torch.float8_e4m3fn) if float8 else out
