"""Launch the kernels of ``select_blocks``, over chunks of queries within a fixed workspace."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from infllm_flex_ops.device import knows_gluon
from infllm_flex_ops.selection.kernels.kernel_args import KernelSizes, Scores
from infllm_flex_ops.selection.kernels.prefill.lse import lse_kernel
from infllm_flex_ops.selection.kernels.prefill.plan import (
    SEGMENT_BLOCKS,
    Chunk,
    Plan,
    make_plan,
    split_columns,
)
from infllm_flex_ops.selection.kernels.prefill.run_topk import (
    Output,
    allocate,
    fill_full_rows,
    measure,
    row_arguments,
    run_topk,
    workspace,
)
from infllm_flex_ops.selection.kernels.prefill.scores import score_kernel
from infllm_flex_ops.selection.kernels.prefill.tiles import (
    HOPPER_STEP,
    Inputs,
    Scoring,
    choose_hopper_options,
    choose_scoring,
    fits_hopper,
)
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.triton_common.descriptors import can_use_tma, describe, describe_strided
from infllm_flex_ops.triton_common.tensor_args import view


class _Tensors(NamedTuple):
    """Queries and keys, and the factor on their dot products in base 2."""

    q: Tensor
    compressed: Tensor
    coarse: Tensor
    qk_scale_log2: float


def launch(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    kv_len: int,
    rule: SelectionRule,
    scale: float,
    documents: Tensor | None = None,
) -> Tensor:
    """List every block for the rows that take all, and score the others chunk by chunk."""
    sizes = measure("select_blocks", q, compressed.shape[1], kv_len, rule, documents)
    out = allocate(sizes, rule, documents, q.device)
    if out.selected.numel() == 0:
        return out.selected
    scoring = choose_for(q, compressed, rule)
    tile = scoring.tile
    plan = make_plan(sizes, rule, tile.TOKENS, tile.HEADS * tile.TOKENS, scoring.stores_segments)
    fill_full_rows(plan, out)
    if not plan.chunks:
        return out.selected
    tensors = _Tensors(q, compressed, coarse, scale * math.log2(math.e))
    scores = workspace(q, plan.num_scores, plan.columns)
    lse = torch.empty(plan.num_lse, dtype=torch.float32, device=q.device)
    desc = _describe(compressed, scoring)
    coarse_desc = describe(coarse, tile.BLOCK_N) if can_use_tma(coarse) else None
    for chunk in plan.chunks:
        if chunk.starts_lse:
            _run_lse(plan, scoring, chunk, tensors, coarse_desc, lse, out)
        _run_scores(plan, scoring, chunk, tensors, desc, lse, scores, out)
        run_topk(plan, scores, chunk.heads, chunk.rows, out)
    return out.selected


def choose_for(q: Tensor, compressed: Tensor, rule: SelectionRule) -> Scoring:
    """Choose how the windows of some compressed keys are scored on their device."""
    inputs = Inputs(
        group=q.shape[1] // compressed.shape[1],
        head_dim=q.shape[3],
        element_size=q.element_size(),
        num_windows=compressed.shape[2],
        has_tma=can_use_tma(compressed),
    )
    hopper = fits_hopper(inputs, rule) and knows_gluon()
    return choose_scoring(inputs, rule, hopper)


def _describe(compressed: Tensor, scoring: Scoring) -> Any:
    """Describe the compressed keys for TMA as the scoring kernel loads them."""
    if scoring.method == "hopper":
        return describe_strided(compressed, HOPPER_STEP, scoring.windows.PER_BLOCK)
    return describe(compressed, scoring.tile.BLOCK_N) if scoring.method == "tma" else None


def _run_lse(
    plan: Plan,
    scoring: Scoring,
    chunk: Chunk,
    tensors: _Tensors,
    coarse_desc: Any,
    lse: Tensor,
    out: Output,
) -> None:
    """Normalise the rows of some chunks at once."""
    rows, heads = chunk.lse_rows, chunk.heads
    lse_kernel[(triton.cdiv(len(rows), plan.tokens) * len(heads),)](
        q=view(tensors.q),
        keys=view(tensors.compressed),
        coarse=view(tensors.coarse),
        coarse_desc=coarse_desc,
        lse_ptr=lse,
        num_heads=len(heads),
        C=tensors.compressed.shape[2],
        C2=tensors.coarse.shape[2],
        qk_scale_log2=tensors.qk_scale_log2,
        SIZES=KernelSizes(plan.rule, plan.part, scoring.windows, scoring.tile, 0),
        **row_arguments(plan, heads, rows, out),
        **scoring.options,
    )


def _run_scores(
    plan: Plan,
    scoring: Scoring,
    chunk: Chunk,
    tensors: _Tensors,
    desc: Any,
    lse: Tensor,
    scores: Scores,
    out: Output,
) -> None:
    """Score the blocks of a chunk."""
    heads, rows = chunk.heads, chunk.rows
    programs = triton.cdiv(len(rows), plan.tokens) * len(heads)
    splits, split_blocks = split_columns(plan.columns, programs)
    segment = SEGMENT_BLOCKS if plan.count_segments(rows) else 0
    kernel, arguments = _scoring_kernel(scoring, tensors.compressed)
    kernel[(programs * splits,)](
        q=view(tensors.q),
        desc=desc,
        lse_ptr=lse,
        out=scores,
        num_heads=len(heads),
        C=tensors.compressed.shape[2],
        split_blocks=split_blocks,
        splits=splits,
        lse_tile=(rows.start - chunk.lse_rows.start) // plan.tokens,
        lse_tiles=triton.cdiv(len(chunk.lse_rows), plan.tokens),
        qk_scale_log2=tensors.qk_scale_log2,
        SIZES=KernelSizes(plan.rule, plan.part, scoring.windows, scoring.tile, segment),
        **row_arguments(plan, heads, rows, out),
        **arguments,
    )


def _scoring_kernel(scoring: Scoring, compressed: Tensor) -> tuple[Any, dict[str, Any]]:
    """The kernel that scores, and the arguments that the other one does not take."""
    if scoring.method == "hopper":
        from infllm_flex_ops.selection.kernels.prefill.scores_hopper import score_hopper_kernel

        stages, options = choose_hopper_options(scoring.tile.HEADS)
        return score_hopper_kernel, {"STAGES": stages, **options}
    return score_kernel, {"keys": view(compressed), **scoring.options}
