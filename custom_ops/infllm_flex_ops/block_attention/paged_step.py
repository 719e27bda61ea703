"""A decode step over pages: select the blocks of each row's newest token, and attend to them."""

from typing import Any

from torch import Tensor

from infllm_flex_ops.block_attention.attend_paged_blocks import attend_paged_blocks
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_paged_blocks import select_paged_blocks
from infllm_flex_ops.transforms import refuse_gradients


@define_operator()
def paged_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    dense_len: int,
    width: int,
    scale: float,
) -> Tensor:
    """Do what ``select_paged_blocks`` and ``attend_paged_blocks`` do, for one query per row.

    On a GPU it takes three launches, the two operators four.

    Args:
        q: Queries ``[T, Hq, D]``.
        k: Pages of keys ``[P, Hkv, page, D]``, as in ``attend_paged_blocks``.
        v: Pages of values ``[P, Hkv, page, D]``.
        compressed: Pages of compressed keys, as in ``select_paged_blocks``.
        coarse: Pages of coarse keys. Given the compressed keys again, the normaliser is exact.
        block_table: Pages of each row in order, int32 ``[B, max_pages]``.
        seq_lens: Tokens of each row, int32 ``[B]``.
        query_start: Row b has the queries from ``query_start[b]`` to ``query_start[b + 1]``, its
            last token or none; int32 ``[B + 1]``. Rows with more queries are left out.
        kernel_size: Pooling window of the compressed keys, in tokens.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens.
        coarse_stride: Step between their windows, in tokens.
        block_size: Keys per block, a multiple of ``kernel_stride``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        dense_len: A query is dense if its row holds fewer tokens than this, its own included.
        width: Slots of the longest list: the budget, or the blocks of the longest dense row.
        scale: Factor on the dot products.

    Returns:
        ``[T, Hq, D]`` in the dtype of ``q``. The results of queries that no row has, and of rows
        that are left out, may hold anything. On the CPU it has the bits of the two operators. On a
        GPU the choice is theirs, and the sums may be rounded otherwise.

    Raises:
        ValueError: A row does not fit its block table. This is checked on the CPU only.
    """
    rows = block_table, seq_lens, query_start
    windows = kernel_size, kernel_stride, coarse_size, coarse_stride
    rule = *windows, block_size, init_blocks, local_blocks, num_selected
    selected = select_paged_blocks.plain(  # type: ignore[attr-defined]
        q, compressed, coarse, *rows, *rule, dense_len, width, 1, scale
    )
    return attend_paged_blocks.plain(  # type: ignore[attr-defined]
        q, k, v, selected, *rows, block_size, 1, scale
    )


@paged_step.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


def _pack(*args: Any) -> tuple[Any, ...]:
    rule, others = SelectionRule.split(args[8:])
    return *args[:8], rule, *others


cuda_launcher(paged_step, "block_attention.kernels.decode_step", "launch_paged", pack=_pack)


refuse_gradients(
    paged_step,
    "paged_step is not differentiable: to train, attend without a cache",
)
