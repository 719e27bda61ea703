"""Shared by the launchers of both prefill selections: the outputs and the kernel that selects."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from infllm_flex_ops.selection.documents import check_documents
from infllm_flex_ops.selection.kernels.kernel_args import Scores
from infllm_flex_ops.selection.kernels.prefill.plan import (
    SEGMENT_BLOCKS,
    Plan,
    Sizes,
    check_num_blocks,
)
from infllm_flex_ops.selection.kernels.prefill.topk import topk_kernel
from infllm_flex_ops.selection.rule import SelectionRule


class Output(NamedTuple):
    """The selected blocks ``[B, Hkv, Sq, K]``, and the documents as kernels take them.

    Attributes:
        selected: To be filled.
        documents: The table, contiguous; without documents any int32 tensor, which is not read.
    """

    selected: Tensor
    documents: Tensor


def measure(
    name: str,
    q: Tensor,
    num_kv_heads: int,
    kv_len: int,
    rule: SelectionRule,
    documents: Tensor | None,
) -> Sizes:
    """Take the sizes of a selection.

    Raises:
        ValueError: The documents do not fit.
        NotImplementedError: A row has too many blocks.
    """
    check_documents(documents, kv_len, q.shape[2])
    check_num_blocks(name, triton.cdiv(kv_len, rule.block_size))
    num_parts = 0 if documents is None else documents.shape[1]
    return Sizes(q.shape[0], num_kv_heads, q.shape[2], kv_len, num_parts)


def allocate(
    sizes: Sizes, rule: SelectionRule, documents: Tensor | None, device: torch.device
) -> Output:
    """Allocate the selected blocks."""
    shape = (sizes.batch, sizes.num_kv_heads, sizes.q_len, rule.num_slots(sizes.kv_len))
    selected = torch.empty(*shape, dtype=torch.int32, device=device)
    return Output(selected, selected if documents is None else documents.contiguous())


def workspace(like: Tensor, num_scores: int, columns: int) -> Scores:
    """Allocate the scores of a chunk."""
    scores = torch.empty(num_scores, dtype=torch.float32, device=like.device)
    segments = torch.empty(num_scores // SEGMENT_BLOCKS, dtype=torch.float32, device=like.device)
    return Scores(scores, segments, columns)


def fill_full_rows(plan: Plan, out: Output) -> None:
    """Write the lists of the rows that take every block."""
    if plan.full_rows:
        no_scores = Scores(out.selected, out.selected, 0)
        run_topk(plan, no_scores, range(plan.sizes.num_heads), plan.full_rows, out)


def row_arguments(plan: Plan, heads: range, rows: range, out: Output) -> dict[str, Any]:
    """Collect the arguments by which a prefill kernel finds the rows of its programs."""
    return {
        "documents_ptr": out.documents,
        "head_start": heads.start,
        "row_start": rows.start,
        "row_end": rows.stop,
        "q_offset": plan.sizes.q_offset,
        "Hkv": plan.sizes.num_kv_heads,
        "num_parts": plan.sizes.num_parts,
        "part_start": plan.part_start,
    }


def run_topk(plan: Plan, scores: Scores, heads: range, rows: range, out: Output) -> None:
    """Select for some rows of some heads by their scores, or every block if there are none."""
    topk = plan.plan_topk(rows, has_scores=scores.columns > 0)
    rule = plan.rule
    topk_kernel[(len(heads) * len(rows),)](
        scores=scores,
        out_ptr=out.selected,
        Sq=plan.sizes.q_len,
        K=out.selected.shape[3],
        BLOCK_SIZE=rule.block_size,
        INIT_BLOCKS=rule.init_blocks,
        LOCAL_BLOCKS=rule.local_blocks,
        PART=plan.part,
        BLOCK_K=triton.next_power_of_2(rule.num_selected),
        TAKEN=topk.segments,
        N=topk.listed,
        num_warps=topk.num_warps,
        maxnreg=topk.maxnreg,
        **row_arguments(plan, heads, rows, out),
    )
