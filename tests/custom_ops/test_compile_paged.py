"""Every kernel over pages compiles for four GPUs, without spills and within shared memory.

Show what each takes: ``pytest tests/custom_ops/test_compile_paged.py -s``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infllm_flex_ops.selection.rule import SelectionRule
from tests.custom_ops.compiled import (
    BRAIN,
    EACH,
    EIGHT,
    FLOAT,
    HALF,
    NONE,
    assert_each_run_has_every_kernel,
    assert_no_spills,
    case,
    compile_call,
    meta,
)
from tests.custom_ops.harness import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("needs the compiler: unset TRITON_INTERPRET", allow_module_level=True)
# Triton 3.9 announces another default of its own; it does not concern a test of resources.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


def _paged(
    dtype: torch.dtype, D: int, G: int, page_size: int = 64, n: int = 1, rows: int = 4
) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_cached_blocks
    from infllm_flex_ops.selection.kernels import append_windows
    from infllm_flex_ops.selection.kernels.decode import launch as select

    rule = SelectionRule(32, 16, 128, 64, 64, 1, 32, 96)
    q = meta(rows, 2 * G, D, dtype=dtype)
    k, v = meta(2, 4096, 2, page_size, D, dtype=dtype)
    windows = (meta(4096, 2, entries, D, dtype=dtype) for entries in (page_size // 16, 1))
    compressed, coarse = windows
    where = (meta(rows, 32768 // page_size, dtype=torch.int32), *meta(2, rows, dtype=torch.int32))
    sizes = (*rule.windows, *rule.coarse_windows)
    append_windows.launch_paged(k, compressed, coarse, *where, n, *sizes)
    select.launch_paged(q, compressed, coarse, *where, rule, 8192, 128, n, D**-0.5)
    selected = meta(2, rows, 128, dtype=torch.int32)
    attend_cached_blocks.launch_paged(q, k, v, selected, *where, 64, n, D**-0.5)


def _paged_chunk(dtype: torch.dtype, D: int, G: int, page_size: int = 64) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_blocks

    q, (k, v) = meta(2048, 2 * G, D, dtype=dtype), meta(2, 1024, 2, page_size, D, dtype=dtype)
    selected, table = (meta(*x, dtype=torch.int32) for x in ((2, 2048, 128), (1024,)))
    attend_blocks.launch_paged(q, k, v, selected, table, 8192, 64, D**-0.5)


def _paged_pooled(
    dtype: torch.dtype,
    D: int,
    G: int,
    n: int,
    float8: bool,
    page_size: int = 64,
    window: int = 1,
    num_dims: int | None = None,
    kept: torch.dtype | None = None,
) -> None:
    from infllm_flex_ops.selection.kernels.decode.launch_pooled import launch_paged

    q = meta(4, 2 * G, D, dtype=dtype)
    keys = meta(4096, 2, page_size // window, num_dims or D, dtype=kept or dtype)
    where = (meta(4, 32768 // page_size, dtype=torch.int32), *meta(2, 4, dtype=torch.int32))
    rule = SelectionRule.from_pooled(window, 64, 1, 4, 96)
    launch_paged(q, keys, *where, rule, 8192, 128, n, float8)


def _paged_pooled_chunk(
    dtype: torch.dtype,
    D: int,
    float8: bool,
    page_size: int = 64,
    window: int = 1,
    kv_len: int = 8192,
    num_dims: int | None = None,
    kept: torch.dtype | None = None,
) -> None:
    from infllm_flex_ops.selection.kernels.prefill.launch_pooled import launch_paged

    q = meta(2, 2048, num_dims or D, dtype=EIGHT if float8 else dtype)
    keys = meta(4096, 2, page_size // window, num_dims or D, dtype=kept or dtype)
    table = meta(kv_len // page_size, dtype=torch.int32)
    launch_paged(q, keys, table, kv_len, SelectionRule.from_pooled(window, 64, 1, 4, 96))


def _paged_rows(dtype: torch.dtype, D: int, G: int, page_size: int = 64) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_paged_rows

    q, out = meta(2, 2048, 2 * G, D, dtype=dtype)
    k, v = meta(2, 1024, 2, page_size, D, dtype=dtype)
    where = (meta(4, 8192 // page_size, dtype=torch.int32), *meta(2, 4, dtype=torch.int32))
    attend_paged_rows.launch(q, k, v, out, *where, 0, 4, 64, 17, 1024, 8191, D**-0.5)


CASES: list[Any] = [
    *case(_paged, BRAIN, 128, 16, on=EACH),
    *case(_paged, BRAIN, 128, 16, 64, 1, 1),  # a program takes one block of a list
    *case(_paged, BRAIN, 64, 4, 128, 4),
    *case(_paged, HALF, 128, 1, 16),  # a block of four pages
    *case(_paged, HALF, 80, 7, 16, 16, on=NONE),
    *case(_paged, FLOAT, 128, 4),
    *case(_paged_pooled, BRAIN, 128, 16, 1, True, on=EACH),
    *case(_paged_pooled, BRAIN, 64, 4, 4, False, 128, on=EACH),
    *case(_paged_pooled, HALF, 128, 1, 1, True, 16, on=EACH),  # a block of four pages
    *case(_paged_pooled, HALF, 256, 4, 16, True, on=EACH),
    *case(_paged_pooled, FLOAT, 128, 3, 1, False, on=EACH),
    *case(_paged_pooled, BRAIN, 80, 7, 16, True, 16, 4, on=NONE),
    *case(_paged_pooled, FLOAT, 256, 4, 5, True, on=NONE),
    *case(_paged_pooled, BRAIN, 128, 4, 1, True, 64, 1, 32, EIGHT, on=EACH),
    *case(_paged_pooled_chunk, BRAIN, 128, True, on=EACH),
    *case(_paged_pooled_chunk, BRAIN, 128, False, 128, on=EACH),
    *case(_paged_pooled_chunk, BRAIN, 64, True, 16, on=EACH),
    *case(_paged_pooled_chunk, HALF, 256, True, on=EACH),
    *case(_paged_pooled_chunk, HALF, 256, False, 16, on=EACH),
    *case(_paged_pooled_chunk, BRAIN, 128, True, 64, 1, 8192, 32, EIGHT, on=EACH),
    *case(_paged_pooled_chunk, FLOAT, 128, True, on=EACH),
    *case(_paged_pooled_chunk, FLOAT, 128, False, on=EACH),
    *case(_paged_pooled_chunk, BRAIN, 80, True, 64, 4, 1 << 18, on=EACH),  # picks from segments
    *case(_paged_pooled_chunk, FLOAT, 256, True, on=NONE),
    *case(_paged_pooled_chunk, BRAIN, 64, False, 64, on=NONE),
    *case(_paged_chunk, BRAIN, 128, 16, on=EACH),
    *case(_paged_chunk, HALF, 64, 4, 128),
    *case(_paged_chunk, BRAIN, 128, 1, 16),
    *case(_paged_chunk, FLOAT, 128, 4),
    *case(_paged_rows, BRAIN, 128, 16, on=EACH),
    *case(_paged_rows, BRAIN, 128, 4, 16),
    *case(_paged_rows, HALF, 64, 1, 128, on=EACH),
    *case(_paged_rows, HALF, 80, 7, on=NONE),
    *case(_paged_rows, HALF, 256, 2, on=NONE),
    *case(_paged_rows, FLOAT, 128, 4),
]


@pytest.mark.parametrize(("call", "args", "capability"), CASES)
def test_compiles_without_spills(
    call: Callable[..., None],
    args: tuple[Any, ...],
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_no_spills(monkeypatch, call, args, capability)


def test_each_run_compiles_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_each_run_has_every_kernel(monkeypatch, CASES)


@pytest.mark.slow  # with the Triton of .venv the tests above compile the same
@pytest.mark.private_api
@pytest.mark.parametrize(
    ("call", "args"),
    [
        (_paged, (BRAIN, 128, 16)),
        (_paged, (BRAIN, 128, 16, 16)),
        (_paged_chunk, (BRAIN, 128, 16)),
        (_paged_pooled, (BRAIN, 128, 16, 1, True)),
        (_paged_pooled_chunk, (BRAIN, 128, True)),
        (_paged_pooled_chunk, (BRAIN, 128, False, 16)),
        (_paged_rows, (BRAIN, 128, 16)),
    ],
)
def test_another_triton_compiles_every_operator_for_hopper(
    call: Callable[..., None], args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_call(monkeypatch, call, args, 90)
