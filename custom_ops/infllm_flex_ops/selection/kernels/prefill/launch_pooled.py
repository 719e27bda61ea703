"""Launch the kernels of ``select_blocks_pooled``, over chunks of queries."""

import triton
from torch import Tensor

from infllm_flex_ops.device import has_little_shared_memory, knows_float8
from infllm_flex_ops.selection.kernels.kernel_args import KernelSizes
from infllm_flex_ops.selection.kernels.prefill.plan import (
    SEGMENT_BLOCKS,
    make_plan,
    split_columns,
)
from infllm_flex_ops.selection.kernels.prefill.pooled_scores import pooled_score_kernel
from infllm_flex_ops.selection.kernels.prefill.run_topk import (
    allocate,
    fill_full_rows,
    measure,
    row_arguments,
    run_topk,
    workspace,
)
from infllm_flex_ops.selection.kernels.prefill.tiles import (
    MAX_WINDOWS,
    Inputs,
    choose_pooled_tile,
    choose_windows,
)
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.triton_common.tensor_args import view


def launch(
    q: Tensor,
    compressed: Tensor,
    kv_len: int,
    rule: SelectionRule,
    documents: Tensor | None = None,
) -> Tensor:
    """List every block for the rows that take all, and score the others chunk by chunk."""
    sizes = measure("select_blocks_pooled", q, q.shape[1], kv_len, rule, documents)
    windows = choose_windows(rule)
    if windows.PER_BLOCK > MAX_WINDOWS:
        raise NotImplementedError(
            f"select_blocks_pooled handles at most {MAX_WINDOWS} windows to a block on CUDA, got "
            f"{windows.PER_BLOCK}: use a smaller block_size or a larger kernel_size"
        )
    out = allocate(sizes, rule, documents, q.device)
    if out.selected.numel() == 0:
        return out.selected
    if q.element_size() == 1 and not knows_float8(q):  # half precision holds e4m3 exactly
        q, compressed = q.half(), compressed.half()
    inputs = Inputs(1, q.shape[3], q.element_size(), compressed.shape[2], has_tma=False)
    tile, options = choose_pooled_tile(inputs, windows.SLOTS, has_little_shared_memory(q))
    plan = make_plan(sizes, rule, tile.TOKENS, 0, stores_segments=True)
    fill_full_rows(plan, out)
    if not plan.chunks:
        return out.selected
    scores = workspace(q, plan.num_scores, plan.columns)
    for chunk in plan.chunks:
        heads, rows = chunk.heads, chunk.rows
        programs = triton.cdiv(len(rows), plan.tokens) * len(heads)
        splits, split_blocks = split_columns(plan.columns, programs)
        pooled_score_kernel[(programs * splits,)](
            q=view(q),
            keys=view(compressed),
            out=scores,
            num_heads=len(heads),
            C=compressed.shape[2],
            split_blocks=split_blocks,
            splits=splits,
            SIZES=KernelSizes(rule, plan.part, windows, tile, SEGMENT_BLOCKS),
            **row_arguments(plan, heads, rows, out),
            **options,
        )
        run_topk(plan, scores, heads, rows, out)
    return out.selected
