"""Block sizes, warps and stages of FlexAttention's Triton kernels, chosen so that none spills.

``pytest tests/flex_kernels -s`` prints their registers, spills and shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions

from infllm_flex_ops import torch_private

_WHOLE = 128  # a length that is a multiple of it holds whole tiles and blocks of any size
_ADMITTED = (128, 128)  # a multiple of every block size that FlexAttention chooses by itself


class _Forward(NamedTuple):
    """Rows and keys of a program's matrix products."""

    M: int
    N: int
    stages: int
    warps: int


class _Backward(NamedTuple):
    """The same for gradients of keys and values (M1, N1) and of queries (M2, N2)."""

    M1: int
    N1: int
    M2: int
    N2: int
    stages: int
    warps: int


def single_mask_options(mask: BlockMask) -> FlexKernelOptions:
    """Fit FlexAttention's matrix products into a mask's tiles and blocks; it chooses the rest."""
    rows, keys = mask.BLOCK_SIZE
    return {"BLOCK_M": min(rows & -rows, 128), "BLOCK_N": min(keys & -keys, 64)}


def inference_options(
    mask: BlockMask, head_dim: int, dtype: torch.dtype, capability: int
) -> FlexKernelOptions:
    """Choose the forward kernel for a mask without a bit test, however few its rows.

    Args:
        mask: A mask whose tiles may have fewer rows than matrix instructions.
        head_dim: Head dim of queries, keys and values, at most 256.
        dtype: Dtype of queries, keys and values.
        capability: Compute capability of the GPU, 90 for Hopper.
    """
    rows, keys = mask.BLOCK_SIZE
    M, N, stages, warps = _choose(rows & -rows, keys & -keys, head_dim, dtype, capability)[0]
    options = {"BLOCK_M": M, "BLOCK_N": N, "num_stages": stages, "num_warps": warps}
    # PyTorch does not declare all of the shared options.
    return torch_private.flex_options(_is_divisible(mask)) | options  # type: ignore[return-value]


def training_options(
    mask: BlockMask, head_dim: int, dtype: torch.dtype, capability: int
) -> tuple[BlockMask, FlexKernelOptions]:
    """Choose kernels for both passes, and make FlexAttention's backward admit them.

    The backward rejects a mask whose tiles and blocks are not multiples of the block sizes that it
    would choose itself, before it looks at the options. On Hopper and Blackwell that rejects blocks
    of 64 keys and fewer (pytorch#176025, open in 2.13). Therefore the returned mask claims larger
    sizes, and the options carry the true ones.

    Args:
        mask: A mask with its lists of tiles by block.
        head_dim: Head dim of queries, keys and values, at most 256.
        dtype: Dtype of queries, keys and values.
        capability: Compute capability of the GPU, 90 for Hopper.

    Returns:
        The mask to pass to FlexAttention, with the same lists, and the options to pass with it.
    """
    rows, keys = mask.BLOCK_SIZE
    forward, backward = _choose(rows & -rows, keys & -keys, head_dim, dtype, capability)
    options = torch_private.flex_options(_is_divisible(mask), (rows, keys))
    for prefix, choice in (("fwd_", forward), ("bwd_", backward)):
        for name, value in choice._asdict().items():
            key = f"num_{name}" if name in ("stages", "warps") else f"BLOCK_{name}"
            options[prefix + key] = value
    admitted = torch_private.block_mask(
        mask.seq_lengths,
        _ADMITTED,
        mask.mask_mod,
        kv=(mask.kv_num_blocks, mask.kv_indices),
        full_kv=(mask.full_kv_num_blocks, mask.full_kv_indices),
        q=(mask.q_num_blocks, mask.q_indices),
        full_q=(mask.full_q_num_blocks, mask.full_q_indices),
    )
    # PyTorch does not declare the options that carry the sizes.
    return admitted, options  # type: ignore[return-value]


def _is_divisible(mask: BlockMask) -> bool:
    return all(length % _WHOLE == 0 for length in mask.seq_lengths)


def _choose(
    rows: int, keys: int, head_dim: int, dtype: torch.dtype, capability: int
) -> tuple[_Forward, _Backward]:
    """Choose for tiles of ``rows`` and blocks of ``keys``, powers of two or multiples of them."""
    wide = head_dim > 128
    if dtype == torch.float32:
        forward = _Forward(min(rows, 32 if head_dim <= 64 else 16), 32, 2, 4)
        backward = _Backward(16, 16 if wide else 32, 16, 16, 2, 4)
    elif wide:
        forward = _Forward(min(rows, 64), 32 if rows >= 64 else 64, 2, 4)
        backward = (
            _Backward(32, 32, 32, 32, 2, 8) if rows >= 64 else _Backward(16, 64, 16, 16, 2, 8)
        )
    else:
        # The fewest warps that do not spill are the fastest; 128 rows in four spill before Hopper.
        stages, warps = (3, 4) if rows >= 64 else (2, 2) if rows >= 32 else (3, 2)
        if rows >= 128:
            stages, warps = (2, 4) if capability >= 90 else (3, 8)
        forward = _Forward(min(rows, 128), 64, stages, warps)
        backward = _Backward(min(rows, 32), 64, min(rows, 64), min(rows, 32), 3, 4)
    N1, M2 = min(backward.N1, keys), min(backward.M2, rows)
    return forward._replace(N=min(forward.N, keys)), backward._replace(
        M1=min(backward.M1, rows, N1), N1=N1, M2=M2, N2=min(backward.N2, keys, M2)
    )
