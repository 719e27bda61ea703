"""Triton kernels of ``transpose_blocks``: mark the listed pairs in a bitmap, then read it by block.

The bitmap is filled by atomic ORs. Their order does not matter, so that the result is
deterministic. It takes one bit where the result reserves a slot of 32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.triton_common.tensor_args import view

_CHUNK = 1024  # tiles whose bits a program expands at a time


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "row_words"])
def _mark_kernel(num, idx, bitmap_ptr, num_tiles, num_blocks, row_words, Hkv, BLOCK: tl.constexpr):
    """Mark the pairs of one tile."""
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    b, h = head // Hkv, head % Hkv
    count = tl.load(num.ptr + b * num.b + h * num.h + tile.to(tl.int64) * num.s)
    idx_ptr = idx.ptr + (b * idx.b + h * idx.h + tile.to(tl.int64) * idx.s)
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        block = tl.load(idx_ptr + slot.to(tl.int64) * idx.d, mask=slot < count, other=0)
        word_ptr = bitmap_ptr + (head * num_blocks + block) * row_words + tile // 32
        bit = tl.zeros([BLOCK], tl.int32) + (1 << (tile % 32))
        tl.atomic_or(word_ptr, bit, mask=slot < count, sem="relaxed")


@triton.jit(do_not_specialize=["num_tiles", "row_words"])
def _read_kernel(bitmap_ptr, q_num_ptr, q_idx_ptr, num_tiles, row_words, CHUNK: tl.constexpr):
    """List the marked tiles of one block, and zero the slots after them."""
    row = tl.program_id(0).to(tl.int64)  # flattened (batch, KV head, block)
    lane = tl.arange(0, CHUNK)
    count = 0
    for start in range(0, num_tiles, CHUNK):
        tile = start + lane
        word_ptr = bitmap_ptr + row * row_words + tile // 32
        word = tl.load(word_ptr, mask=tile < num_tiles, other=0)
        marked = (word >> (tile % 32)) & 1
        place = count + tl.cumsum(marked, 0) - 1
        tl.store(q_idx_ptr + row * num_tiles + place, tile, mask=marked != 0)
        count += tl.sum(marked, 0)
    tl.store(q_num_ptr + row, count)
    for start in range(count, num_tiles, CHUNK):
        slot = start + lane
        tl.store(q_idx_ptr + row * num_tiles + slot, 0, mask=slot < num_tiles)


def mark(num: Tensor, idx: Tensor, num_blocks: int, slots: int) -> Tensor:
    """Mark every listed pair in a bitmap, int32 ``[B * Hkv * num_blocks, row_words]``.

    Args:
        num: Blocks of each list, int32 ``[B, Hkv, num_tiles]``.
        idx: The blocks, int32 ``[B, Hkv, num_tiles, width]``.
        num_blocks: Number of blocks.
        slots: Slots of a list that are read at a time, a power of two.
    """
    B, Hkv, num_tiles, _ = idx.shape
    row_words = triton.cdiv(num_tiles, 32)
    bitmap = torch.zeros(B * Hkv * num_blocks, row_words, dtype=torch.int32, device=idx.device)
    if idx.numel():
        _mark_kernel[(B * Hkv * num_tiles,)](
            num=view(num[..., None]),
            idx=view(idx),
            bitmap_ptr=bitmap,
            num_tiles=num_tiles,
            num_blocks=num_blocks,
            row_words=row_words,
            Hkv=Hkv,
            BLOCK=slots,
            num_warps=2,
        )
    return bitmap


def launch(num: Tensor, idx: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Mark every listed pair, then list each block's marks."""
    B, Hkv, num_tiles, width = idx.shape
    q_num = torch.empty(B, Hkv, num_blocks, dtype=torch.int32, device=idx.device)
    q_idx = torch.empty(B, Hkv, num_blocks, num_tiles, dtype=torch.int32, device=idx.device)
    if q_num.numel() == 0:
        return q_num, q_idx
    bitmap = mark(num, idx, num_blocks, min(256, triton.next_power_of_2(width)))
    _read_kernel[(B * Hkv * num_blocks,)](
        bitmap_ptr=bitmap,
        q_num_ptr=q_num,
        q_idx_ptr=q_idx,
        num_tiles=num_tiles,
        row_words=bitmap.shape[1],
        CHUNK=_CHUNK,
    )
    return q_num, q_idx
