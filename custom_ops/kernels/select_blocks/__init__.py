"""Triton kernels of ``select_blocks``, run over chunks of queries within a fixed workspace."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from custom_ops.kernels.capability import knows_gluon
from custom_ops.kernels.descriptors import describe, describe_strided, has_boxes
from custom_ops.kernels.select_blocks.lse import lse_kernel
from custom_ops.kernels.select_blocks.pick import SEGMENT, pick_kernel
from custom_ops.kernels.select_blocks.scores import score_kernel

_SCORE_BYTES = 176 << 20
_LSE_BYTES = 64 << 20
_MAX_BLOCKS = 1 << 14  # a row's scores live in the registers of at most 32 warps
_MIN_PROGRAMS = 1024  # several per multiprocessor: below that, columns are split among programs


def launch(
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
    """Fill the rows that take every block directly, and score the others chunk by chunk."""
    B, _, Sq, _ = q.shape
    Hkv = compressed.shape[1]
    num_blocks = triton.cdiv(kv_len, block_size)
    if num_blocks > _MAX_BLOCKS:
        raise NotImplementedError(
            f"select_blocks handles at most {_MAX_BLOCKS} blocks on CUDA, got {num_blocks}: "
            f"use a larger block_size"
        )
    K = min(num_selected, num_blocks)
    out = torch.empty(B, Hkv, Sq, K, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    offset = kv_len - Sq
    per_block = block_size // kernel_stride
    before = kernel_size // kernel_stride - 1
    # Windows that begin before a block: scored with the block they begin in, or, if they begin
    # further back than in the one before, scored again.
    tail, before = (before, 0) if before <= per_block else (0, before)
    slots = triton.next_power_of_2(per_block + before)
    tile = _tile(q, Hkv, slots)
    tokens, tile_rows = tile["TOKENS"], tile["HEADS"] * tile["TOKENS"]
    parts = _parts(documents, kv_len, offset, tokens)
    table = out if documents is None else documents.contiguous()
    rule = {"BLOCK_SIZE": block_size, "PART": parts.size, "PART_ROWS": parts.rows}
    picking = {
        **rule,
        "INIT_BLOCKS": init_blocks,
        "LOCAL_BLOCKS": local_blocks,
        "BLOCK_K": triton.next_power_of_2(num_selected),
    }

    # Of the last block, which is never scored if it is local, the boxes may lack some windows.
    strided = before == 0 and local_blocks > 0 and compressed.shape[2] >= per_block
    strided = strided and _can_stride(q, compressed, tile)
    step_blocks = 64 if strided else tile["BLOCK_N"] // slots
    taken = _taken_segments(num_selected - local_blocks - 1, init_blocks, step_blocks)

    def listed(rows: range) -> int:
        """Count the blocks that some of the rows see, up to a power of two."""
        visible = (offset + rows.stop - 1) // block_size + 1 if documents is None else num_blocks
        return max(128, triton.next_power_of_2(visible))

    def segments(rows: range) -> int:
        """How many segments the rows' blocks are picked from: of long rows a few; 0, all."""
        return taken if 2 * taken * SEGMENT.value <= listed(rows) else 0

    def pick(scores: Tensor, bests: Tensor, heads: range, rows: range, columns: int) -> None:
        N = listed(rows) if columns else 16  # nothing scored, nothing to choose
        picked = segments(rows) if columns else 0
        width = max(N // SEGMENT.value, picked * SEGMENT.value) if picked else N
        # For more rows side by side. On one H100 with 8 KV heads 104 registers take 1.09 instead of
        # 0.98 ms at 64K tokens, where no segments are picked, and 24.6 instead of 22.4 at 512K.
        registers = (88 if picked else 72) if width <= 1024 else 128
        pick_kernel[(len(heads) * len(rows),)](
            scores,
            bests,
            out,
            table,
            heads.start,
            rows.start,
            rows.stop,
            offset,
            columns,
            Sq,
            K,
            Hkv,
            parts.count,
            parts.first,
            **picking,
            TAKEN=picked,
            N=N,
            num_warps=max(1, width // 1024),
            maxnreg=registers,
        )

    all_heads = range(B * Hkv)
    num_rows, first_scored = parts.total, 0
    if documents is None:  # else only the device knows which rows take every block
        num_rows, first_scored = Sq, min(max(num_selected * block_size - offset, 0), Sq)
    if first_scored:
        pick(out, out, all_heads, range(first_scored), 0)
    if first_scored == num_rows:
        return out

    columns = (kv_len - 1) // block_size - local_blocks
    columns = max(64, triton.cdiv(columns, 64) * 64)  # rows start aligned, for wide loads
    num_tiles = triton.cdiv(num_rows - first_scored, tokens)
    step_heads, step_tiles = _chunk(
        _SCORE_BYTES, 4 * (columns + columns // SEGMENT.value) * tokens, B * Hkv, num_tiles
    )
    lse_chunks = max(1, _LSE_BYTES // (4 * tile_rows * step_heads * step_tiles))
    span_tiles = min(step_tiles * lse_chunks, num_tiles)
    scores = _workspace(q, step_heads * step_tiles * tokens * columns)
    bests = _workspace(q, scores.numel() // SEGMENT.value)
    lse = _workspace(q, step_heads * span_tiles * tile_rows)
    factor = scale * math.log2(math.e)
    # A box holds windows without gaps between those of one block and the next.
    boxed = not strided and slots == per_block and has_boxes(compressed)
    boxes = describe(compressed, tile["BLOCK_N"]) if boxed else None
    lse_boxed = has_boxes(coarse)
    lse_boxes = describe(coarse, tile["BLOCK_N"]) if lse_boxed else None
    if (boxed or strided) and tile["HEADS"] > 2:
        # Another program side by side is worth more than another stage: on one H200 at 64K tokens
        # with 8 KV heads scores take 3.0 ms with two stages instead of 3.1, their log-sum-exp 0.7
        # instead of 0.8; with 2 KV heads scores take 2.05 with one, 2.2 with two.
        tile["num_stages"] = 1 if tile["HEADS"] >= 16 else 2
    of_tokens = {
        **rule,
        "G": q.shape[1] // Hkv,
        "D": q.shape[3],
        "KERNEL_SIZE": kernel_size,
        "KERNEL_STRIDE": kernel_stride,
        "DENSE": num_selected * block_size,
    }
    shared = {**of_tokens, **tile}
    score: Any = score_kernel
    scoring = {**shared, "PER_BLOCK": per_block, "BEFORE": before, "SLOTS": slots, "BOXES": boxed}
    if strided:
        from custom_ops.kernels.select_blocks.boxed_scores import score_boxed_kernel as score

        boxes = describe_strided(compressed, tile["BLOCK_N"], per_block)
        scoring = {**of_tokens, "SLOTS": per_block, **_choose_strided(tile)}
    for head in range(0, B * Hkv, step_heads):
        heads = all_heads[head : head + step_heads]
        for row in range(first_scored, num_rows, step_tiles * tokens):
            chunk = (row - first_scored) // (step_tiles * tokens) % lse_chunks
            if chunk == 0:  # many chunks at once: a chunk alone would not fill the device
                span = range(num_rows)[row : row + span_tiles * tokens]
                lse_kernel[(triton.cdiv(len(span), tokens) * len(heads),)](
                    q,
                    compressed,
                    coarse,
                    lse_boxes,
                    lse,
                    table,
                    *q.stride(),
                    *compressed.stride(),
                    *coarse.stride(),
                    heads.start,
                    len(heads),
                    span.start,
                    span.stop,
                    offset,
                    compressed.shape[2],
                    coarse.shape[2],
                    factor,
                    Hkv,
                    parts.count,
                    parts.first,
                    COARSE_SIZE=coarse_size,
                    COARSE_STRIDE=coarse_stride,
                    BOXES=lse_boxed,
                    **shared,
                )
            rows = range(num_rows)[row : row + step_tiles * tokens]
            programs = triton.cdiv(len(rows), tokens) * len(heads)
            splits, split_blocks = _split(columns, programs)
            score[(programs * splits,)](
                q,
                compressed,
                boxes,
                lse,
                scores,
                bests,
                table,
                *q.stride(),
                *compressed.stride(),
                heads.start,
                len(heads),
                rows.start,
                rows.stop,
                offset,
                compressed.shape[2],
                columns,
                split_blocks,
                splits,
                chunk * step_tiles,
                triton.cdiv(len(span), tokens),
                factor,
                Hkv,
                parts.count,
                parts.first,
                LOCAL_BLOCKS=local_blocks,
                TAIL=tail,
                SEGMENT=SEGMENT.value if segments(rows) else 0,
                **scoring,
            )
            pick(scores, bests, heads, rows, columns)
    return out


def _taken_segments(room: int, init_blocks: int, step_blocks: int) -> int:
    """How many segments of a long row hold the ``room`` best blocks, up to a power of two.

    0 where the scores come in steps that are no whole segments.
    """
    if step_blocks % SEGMENT.value:
        return 0
    forced = triton.cdiv(init_blocks, SEGMENT.value)
    return triton.next_power_of_2(max(room - init_blocks, 0) + forced + 1)


def _can_stride(q: Tensor, compressed: Tensor, tile: dict[str, int]) -> bool:
    """Whether windows are scored one of every block at a time, in boxes: on Hopper, by Gluon.

    On one H100 at 64K tokens that takes 23 % less time with one head to a group, 14 with 4, 10
    with 7; a whole selection with 16 takes 3 % less on one H200, 5 at 128K.
    """
    fits = tile["BLOCK_D"] in (64, 128) and tile["HEADS"] <= 16 and q.element_size() == 2
    return fits and has_boxes(compressed) and knows_gluon()


def _choose_strided(tile: dict[str, int]) -> dict[str, int | None]:
    """Choose the room of a program that scores windows one of every block at a time."""
    # Three programs side by side on a multiprocessor, or four where a tile's tokens, and so its
    # scores, are few; scores of many tokens take registers.
    ring, registers = (1, 128) if tile["HEADS"] == 16 else (2, 168)
    return {
        **{name: tile[name] for name in ("BLOCK_D", "HEADS", "TOKENS")},
        "RING": ring,
        "num_warps": 4,
        "maxnreg": registers if tile["HEADS"] > 1 else None,
    }


class _Parts(NamedTuple):
    """The equal parts of the positions that a table of documents tells about; no part, all 0."""

    count: int
    size: int
    rows: int  # whole tiles, so that no tile holds two documents; some rows then have no query
    first: int  # the part of the first query

    @property
    def total(self) -> int:
        """Rows of all parts from the first query's on."""
        return (self.count - self.first) * self.rows


def _parts(documents: Tensor | None, kv_len: int, offset: int, tokens: int) -> _Parts:
    if documents is None:
        return _Parts(0, 0, 0, 0)
    count = documents.shape[1]
    size = kv_len // count
    return _Parts(count, size, triton.cdiv(size, tokens) * tokens, offset // size)


def _workspace(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _chunk(limit: int, tile_bytes: int, num_heads: int, num_tiles: int) -> tuple[int, int]:
    """Choose how many heads, and how many tiles of each, are scored within ``limit`` bytes."""
    budget = max(1, limit // tile_bytes)
    heads = min(num_heads, budget)
    return heads, min(num_tiles, budget // heads)


def _tile(q: Tensor, Hkv: int, slots: int) -> dict[str, int]:
    """Choose the tile by dtype, head dim and group alone, so that a row's bits never change."""
    heads = triton.next_power_of_2(q.shape[1] // Hkv)
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    if q.element_size() > 2:  # float32 without tensor cores: the tile must fit in registers
        rows, block_n, warps, stages = 32, 32, 8, 1
    elif block_d <= 128 and heads > 2:
        # Rows of many heads give few scores: there a third program is worth more than a third
        # stage.
        rows, block_n, warps, stages = 128, 64, 4, 2 if heads >= 16 else 3
    else:  # wide heads take registers, and so do the scores of many tokens
        rows, block_n, warps, stages = 64, 64, 4, 2 if block_d > 128 else 3
    rows = max(rows, heads)
    return {
        "HEADS": heads,
        "TOKENS": rows // heads,
        "BLOCK_N": max(block_n, slots),
        "BLOCK_D": block_d,
        "IN_PARTS": q.element_size() > 2,
        "num_warps": warps,
        "num_stages": stages,
    }


def _split(columns: int, programs: int) -> tuple[int, int]:
    """Cut the blocks among programs: enough of them at any length, long runs where they abound."""
    splits = max(
        triton.cdiv(columns, 512), min(triton.cdiv(columns, 64), _MIN_PROGRAMS // programs)
    )
    split_blocks = triton.cdiv(triton.cdiv(columns, splits), 64) * 64
    return triton.cdiv(columns, split_blocks), split_blocks
