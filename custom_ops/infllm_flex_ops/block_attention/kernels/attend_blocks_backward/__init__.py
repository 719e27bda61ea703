"""Triton kernels of ``attend_blocks_backward``: queries by tile, keys and values by block.

No sum is atomic: a gradient is summed in a fixed order, so its bits repeat.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dkv import dkv_kernel
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dkv_args import KeyGradients
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dq import dq_kernel
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.plan import (
    REDUCED_KEYS,
    BackwardPlan,
    choose_tile_tokens,
    plan_backward,
)
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.reduce import reduce_kernel
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.splits import (
    Splits,
    split_long_lists,
)
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.tiles_by_block import (
    TilesByBlock,
    sort_by_block,
)
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.triton_common.descriptors import describe, describe_groups, describe_lines
from infllm_flex_ops.triton_common.tensor_args import Lists, view

__all__ = ["choose_tile_tokens", "differentiate", "launch"]


class Inputs(NamedTuple):
    """Inputs of the gradients: tensors, or views of them in a kernel."""

    grad_out: Any
    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any


class RowSums(NamedTuple):
    """Numbers of each row that the dq kernel keeps for the dkv kernel, where ``RowLayout`` says.

    Attributes:
        row_lse: Log-sum-exp in base 2.
        row_delta: Dot product of the output and its gradient.
    """

    row_lse: Any
    row_delta: Any


_Arguments = dict[str, Any]  # of a kernel, by name


def differentiate(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    block_size: int,
    scale: float,
    tile_tokens: int | None = None,
    unit: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """List the blocks of every tile, and sum the gradients over them."""
    tile_tokens = union_lists.fit_unit(tile_tokens or choose_tile_tokens(q, k), unit)
    lists = union_lists.list_blocks(selected, k.shape[2], block_size, tile_tokens)
    rest = (block_size, tile_tokens, scale, selected)
    return launch(grad_out, q, k, v, out, lse, *lists, *rest)


def launch(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num: Tensor,
    idx: Tensor,
    membership: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the lists by tile for dq, and sorted by block for dk and dv.

    With ``selected``, from which the lists were built, dk and dv may walk the tokens' own lists.
    """
    (B, Hkv, Skv, D), device = k.shape, q.device
    dq = torch.empty_like(out)
    dk, dv = (torch.empty(B, Hkv, Skv, D, dtype=x.dtype, device=x.device) for x in (k, v))
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    slots = None if selected is None else selected.shape[3]
    plan = plan_backward(grad_out, q, k, v, idx, block_size, tile_tokens, slots)
    lists = Lists(num.contiguous(), idx.contiguous(), membership.contiguous(), idx.shape[3])
    inputs = Inputs(grad_out, q, k, v, out, lse.contiguous())
    shared = {
        "inputs": Inputs(*map(view, inputs[:-1]), inputs.lse),
        "Sq": q.shape[2],
        "Skv": Skv,
        "scale": scale,
        "Hkv": Hkv,
    }
    per_row = (B * Hkv, num.shape[2], plan.row_layout.TILE_ROWS)
    rows = RowSums(
        torch.full(per_row, torch.inf, dtype=torch.float32, device=device),
        torch.zeros(per_row, dtype=torch.float32, device=device),
    )
    _launch_dq(plan, inputs, shared, lists, rows, dq)
    if selected is not None and plan.dkv.tile.GATHERED:
        lists = _list_tokens(selected, Skv, block_size)
    tiles = sort_by_block(lists, plan.num_blocks)
    counts = tiles.length.view(B * Hkv, plan.num_blocks)
    splits = split_long_lists(counts, plan.dkv.split_size, plan.max_splits)
    grads = _allocate_sums(plan, dk, dv)
    _launch_dkv(plan, inputs, shared, rows, tiles, splits, grads)
    _launch_reduce(plan, splits, grads)
    return dq, dk, dv


def _list_tokens(selected: Tensor, Skv: int, block_size: int) -> Lists:
    """Take the tokens' own lists for tiles of one token, without blocks that begin after them."""
    Sq, K = selected.shape[2:]
    own = torch.arange(Skv - Sq, Skv, device=selected.device)[:, None] // block_size
    num = ((selected >= 0) & (selected <= own)).sum(-1, dtype=torch.int32)
    return Lists(num, selected.contiguous(), None, K)


def _allocate_sums(plan: BackwardPlan, dk: Tensor, dv: Tensor) -> KeyGradients:
    """Allocate the sums on the way to ``dk`` and ``dv``.

    Splits take ``64 + blocks / 16`` slots per head. Ranges take slots only where there are several:
    in ``first`` at most 256 per head if all keys have queries, in ``sums`` one for each block of
    two heads and up to 1024 more. With 64 keys of 128 dims a slot has 64 KiB.
    """
    heads, D, block_size = dk.shape[0] * dk.shape[1], plan.shape.D, plan.shape.BLOCK_SIZE
    ranges, num_blocks = plan.dkv.ranges, plan.num_blocks
    first = heads * ranges.first_blocks if ranges.others else 0
    sums = ranges.sum_heads * num_blocks if ranges.others else 0
    slots = (
        torch.empty(n, 2, block_size, D, dtype=torch.float32, device=dk.device)
        for n in (heads * plan.max_splits, first, sums)
    )
    flags = 1 + heads * (1 + 2 * num_blocks) if plan.dkv.tile.IN_RANGES else 0
    return KeyGradients(dk, dv, *slots, torch.zeros(flags, dtype=torch.int32, device=dk.device))


def _launch_dq(
    plan: BackwardPlan, inputs: Inputs, shared: _Arguments, lists: Lists, rows: RowSums, dq: Tensor
) -> None:
    """Fill ``dq`` and what the other kernel needs of each row."""
    tile = plan.dq.tile
    k_desc, v_desc = (
        describe(x, tile.BLOCK_N) if plan.keys_by_tma else None for x in (inputs.k, inputs.v)
    )
    dq_kernel[(plan.dq.programs,)](
        k_desc=k_desc,
        v_desc=v_desc,
        lists=lists,
        **rows._asdict(),
        dq_ptr=dq,
        num_tiles=lists.num.shape[2],
        SHAPE=plan.shape,
        TILE=tile,
        ROW_LAYOUT=plan.row_layout,
        **shared,
        **plan.dq.options,
    )


def _launch_dkv(
    plan: BackwardPlan,
    inputs: Inputs,
    shared: _Arguments,
    rows: RowSums,
    tiles: TilesByBlock,
    splits: Splits,
    grads: KeyGradients,
) -> None:
    """Fill ``dk`` and ``dv`` of whole blocks, and ``partial`` for the splits of the others."""
    (B, Hkv), tile, ranges = inputs.k.shape[:2], plan.dkv.tile, plan.dkv.ranges
    do_desc = q_desc = None
    if plan.rows_by_tma:
        do_desc, q_desc = (
            describe_groups(x, Hkv, plan.row_layout.BOX_TOKENS) for x in (inputs.grad_out, inputs.q)
        )
        rows = RowSums(*(describe_lines(x, tile.ROWS) for x in rows))
    dkv_kernel[(plan.dkv.programs,)](
        do_desc=do_desc,
        q_desc=q_desc,
        **rows._asdict(),
        tiles=tiles,
        splits=splits,
        grads=grads,
        max_splits=plan.max_splits,
        num_tiles=plan.dkv.num_tiles,
        split_size=plan.dkv.split_size,
        first_tiles=ranges.first_tiles,
        range_tiles=ranges.tiles,
        heads_at_once=ranges.heads_at_once,
        sum_heads=ranges.sum_heads,
        heads=B * Hkv,
        SHAPE=plan.dkv.shape,
        TILE=tile,
        INDEX=tl.int32 if plan.fits_32_bits else tl.int64,
        maxnreg=plan.dkv.registers,
        **shared,
        **plan.dkv.options,
    )


def _launch_reduce(plan: BackwardPlan, splits: Splits, grads: KeyGradients) -> None:
    """Add up the splits of blocks into ``dk`` and ``dv``."""
    reduce_kernel[(plan.reduce_programs,)](
        splits=splits,
        grads=grads,
        Skv=grads.dk.shape[2],
        num_blocks=plan.num_blocks,
        max_splits=plan.max_splits,
        D=plan.shape.D,
        BLOCK_SIZE=plan.shape.BLOCK_SIZE,
        BLOCK_N=REDUCED_KEYS,
        BLOCK_D=plan.dkv.tile.BLOCK_D,
        num_warps=8,
    )
