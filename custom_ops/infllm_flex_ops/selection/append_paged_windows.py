"""Write the compressed and coarse keys that new tokens complete into the pages of a cache."""

from typing import Any

from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.pages import gather_tokens, last_tokens, list_rows, locate
from infllm_flex_ops.selection.append_windows import average_slowest
from infllm_flex_ops.selection.compress_keys import num_windows
from infllm_flex_ops.selection.rule import Windows


@define_operator(mutates_args=("compressed", "coarse"))
def append_paged_windows(
    k: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    max_new: int,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
) -> None:
    """Write the windows whose last key is among each row's newest tokens, and no others.

    A window lies in the page of its last key, as entry ``last % page // step``. It has the bits
    that ``compress_keys`` gives it. It depends on the tokens up to its last key only, so that it
    never has to be written again while its page is valid.

    Args:
        k: Pages of keys ``[P, Hkv, page, D]``, which hold the new ones. ``page`` is a multiple of
            ``kernel_stride``, and either a multiple or a divisor of ``coarse_stride``.
        compressed: Pages of compressed keys ``[P, Hkv, page / kernel_stride, num_dims]``, with dims
            and dtype as in ``append_windows``.
        coarse: Pages of coarse keys ``[P, Hkv, ceil(page / coarse_stride), D]``; None for
            compressed keys only.
        block_table: Pages of each row in order, int32 ``[B, max_pages]``.
        seq_lens: Tokens of each row, the new ones included, int32 ``[B]``.
        query_start: The new tokens of row b are its last ``query_start[b + 1] - query_start[b]``
            ones, int32 ``[B + 1]``.
        max_new: The largest number of new tokens in a row; it sizes the launch on a GPU.
        kernel_size: Pooling window of the compressed keys, in tokens, a multiple of the step.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens, a multiple of the step.
        coarse_stride: Step between their windows, in tokens.

    Raises:
        ValueError: A row does not fit its block table. This is checked on the CPU only.
    """
    page_size = k.shape[2]
    levels = [(compressed, Windows(kernel_size, kernel_stride))]
    if coarse is not None:
        levels.append((coarse, Windows(coarse_size, coarse_stride)))
    for row in list_rows(block_table, seq_lens, query_start, page_size):
        for pages, windows in levels:
            written = num_windows(row.positions[0], *windows)
            complete = num_windows(row.length, *windows)
            if complete <= written:
                continue
            end = (complete - 1) * windows.stride + windows.size
            tokens = gather_tokens(k, row.table, written * windows.stride, end)[None]
            averages = average_slowest(tokens, complete - written, windows, pages)[0]
            last = last_tokens(range(written, complete), *windows, k.device)
            page, entry = locate(row.table, last, windows.stride, page_size)
            pages[page, :, entry] = averages.transpose(0, 1)


@append_paged_windows.register_fake
def _(*_: Any) -> None:
    return None


cuda_launcher(append_paged_windows, "selection.kernels.append_windows", "launch_paged")
