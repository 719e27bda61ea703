"""Triton kernel of ``pool_queries``, and the rounding that scoring kernels share with it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.device import knows_float8

_ROWS = 8  # tokens of a program


@triton.jit
def average_heads(q_ptr, stride_qh, mask, G: tl.constexpr):
    """Average ``G`` heads in float32; ``q_ptr`` points at the elements of the first."""
    total = tl.load(q_ptr, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, G):
        q_ptr += stride_qh
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
    """Round float32 to what e4m3 holds, ties to even; larger numbers become 448.

    By arithmetic, since not every GPU knows the type.
    """
    x = tl.minimum(tl.maximum(x, -448.0), 448.0, propagate_nan=tl.PropagateNan.ALL)
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000  # three bits after the leading one
    small = (x + 24576.0) - 24576.0  # below 2 ** -6 steps of 2 ** -9
    return tl.where(tl.abs(x) < 0.015625, small, normal.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["S"])
def _pool_kernel(
    q_ptr,
    out_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    S,
    Hkv,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    FIT: tl.constexpr,
):
    tiles = tl.cdiv(S, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < S)[:, None] & (d < D)[None, :]
    first = head // Hkv * stride_qb + head % Hkv * G * stride_qh
    at = row.to(tl.int64)[:, None] * stride_qs + d[None, :] * stride_qd
    x = average_heads(q_ptr + first + at, stride_qh, mask, G)
    if FIT:
        x = round_like_float8(fit_float8(x))
    out = (head * S + row)[:, None] * D + d[None, :]
    tl.store(out_ptr + out, x.to(out_ptr.dtype.element_ty), mask=mask)


def launch(q: Tensor, num_kv_heads: int, float8: bool) -> Tensor:
    """Average and round in one pass over the queries."""
    B, Hq, S, D = q.shape
    # Half precision holds every number of e4m3.
    dtype = q.dtype if not float8 else torch.float8_e4m3fn if knows_float8(q) else torch.float16
    out = torch.empty(B, num_kv_heads, S, D, dtype=dtype, device=q.device)
    if out.numel():
        _pool_kernel[(B * num_kv_heads * triton.cdiv(S, _ROWS),)](
            q,
            out,
            *q.stride(),
            S,
            num_kv_heads,
            G=Hq // num_kv_heads,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            ROWS=_ROWS,
            FIT=float8,
            num_warps=4,
        )
    return out.to(torch.float8_e4m3fn) if float8 else out
