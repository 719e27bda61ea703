"""Every kernel of selection compiles for four GPUs without spills and within shared memory.

Show what each takes: ``pytest tests/custom_ops/test_compile_selection.py -s``.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarking.ahead_of_time import SHARED_LIMIT, compile_kernel, record_launches
from infllm_flex_ops.device import knows_float8
from infllm_flex_ops.selection.rule import SelectionRule
from tests.custom_ops.compiled import (
    AMPERE_TOO,
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
    compile_launch,
    meta,
)
from tests.custom_ops.harness import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("needs the compiler: unset TRITON_INTERPRET", allow_module_level=True)
# Triton 3.9 announces another default of its own; it does not concern a test of resources.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


def _compress(dtype: torch.dtype, D: int) -> None:
    from infllm_flex_ops.selection.kernels.compress_keys import launch

    launch(meta(1, 2, 4096, D, dtype=dtype), 32, 16)
    launch(meta(1, 2, 4096, D, dtype=dtype), 128, 64)


def _select(
    dtype: torch.dtype,
    D: int,
    G: int,
    S: int = 8192,
    size: int = 32,
    block_size: int = 64,
    stride: int = 16,
) -> None:
    from infllm_flex_ops.selection.kernels.prefill.launch import launch

    q, sizes = meta(1, 2 * G, S, D, dtype=dtype), (size, stride, 4 * size, 4 * stride)
    compressed, coarse = (
        meta(1, 2, (S - w) // s + 1, D, dtype=dtype) for w, s in (sizes[:2], sizes[2:])
    )
    rule = SelectionRule(*sizes, block_size, 1, 2048 // block_size, 96)
    launch(q, compressed, coarse, S, rule, D**-0.5)


def _select_pooled(dtype: torch.dtype, D: int, window: int = 1, S: int = 8192) -> None:
    from infllm_flex_ops.selection.kernels.prefill.launch_pooled import launch

    q, keys = meta(1, 2, S, D, dtype=dtype), meta(1, 2, S // window, D, dtype=dtype)
    launch(q, keys, S, SelectionRule.from_pooled(window, 64, 1, 4, 96))


def _select_documents(dtype: torch.dtype, D: int, G: int) -> None:
    from infllm_flex_ops.selection.kernels.prefill.launch import launch

    S = 8192
    q = meta(1, 2 * G, S, D, dtype=dtype)
    compressed, coarse = (
        meta(1, 2, (S - w) // s + 1, D, dtype=dtype) for w, s in ((32, 16), (128, 64))
    )
    documents = meta(1, S // 64, 3, dtype=torch.int32)
    rule = SelectionRule(32, 16, 128, 64, 64, 1, 32, 128)
    launch(q, compressed, coarse, S, rule, D**-0.5, documents)


def _pool(dtype: torch.dtype, D: int, G: int, float8: bool, num_dims: int) -> None:
    from infllm_flex_ops.selection.kernels.pool_queries import launch

    launch(meta(1, 2 * G, 4096, D, dtype=dtype), 2, float8, num_dims)


def _cached_pooled(
    dtype: torch.dtype,
    D: int,
    G: int,
    n: int,
    float8: bool,
    num_dims: int | None = None,
    kept: torch.dtype | None = None,
) -> None:
    from infllm_flex_ops.selection.kernels.decode.launch_pooled import launch

    q = meta(1, 2 * G, n, D, dtype=dtype)
    k = meta(1, 2, 32768, num_dims or D, dtype=kept or dtype)
    ends = [meta(1, dtype=torch.int64) for _ in range(2)]
    launch(q, k, *ends, SelectionRule.from_pooled(1, 64, 1, 4, 96), 8192, 128, float8)


def _append_slowest(dtype: torch.dtype, D: int, num_dims: int, float8: bool) -> None:
    from infllm_flex_ops.selection.kernels import append_windows

    k, ends = meta(1, 8, 8192, D, dtype=dtype), [meta(1, dtype=torch.int64) for _ in range(2)]
    kept = EIGHT if float8 and knows_float8(k) else dtype
    windows = meta(1, 8, 8192, num_dims, dtype=kept)
    for num_new in (1, 4096):
        append_windows.launch(k, windows, None, *ends, None, None, num_new, 1, 1, 4, 4)


def _select_cached(
    dtype: torch.dtype,
    D: int,
    G: int,
    n: int = 1,
    block_size: int = 64,
    S: int = 32768,
    key_dtype: torch.dtype | None = None,
    sizes: tuple[int, int, int, int] = (32, 16, 128, 64),
) -> None:
    from infllm_flex_ops.selection.kernels import append_windows
    from infllm_flex_ops.selection.kernels.decode.launch import launch

    q, k = meta(1, 2 * G, n, D, dtype=dtype), meta(1, 2, S, D, dtype=key_dtype or dtype)
    windows = [meta(1, 2, S // stride, D, dtype=dtype) for stride in sizes[1::2]]
    ends = [meta(1, dtype=torch.int64) for _ in range(2)]
    append_windows.launch(k, *windows, *ends, None, None, n, *sizes)
    padded = [meta(1, dtype=torch.int64) for _ in range(2)]  # a start and an end given for each row
    append_windows.launch(k, *windows, *ends, *padded, n, *sizes)
    rule = SelectionRule(*sizes, block_size, 1, 2048 // block_size, 96)
    launch(q, *windows, *ends, rule, 8192, 128, D**-0.5)


CASES: list[Any] = [
    *case(_compress, BRAIN, 128, on=EACH),
    *case(_compress, FLOAT, 80, on=EACH),
    *case(_select, BRAIN, 128, 16, on=AMPERE_TOO),
    *case(_select, BRAIN, 64, 4, on=NONE),
    *case(_select, BRAIN, 128, 64, on=NONE),
    *case(_select, HALF, 80, 7),
    *case(_select, HALF, 256, 1, on=EACH),
    *case(_select, BRAIN, 128, 1),
    *case(_select, HALF, 80, 2),
    *case(_select, BRAIN, 128, 16, 8192, 96, 32),
    *case(_select, BRAIN, 256, 4, 8192, 8, 64, 4, on=EACH),  # as `patch_model` takes for wide heads
    *case(_select, FLOAT, 256, 4, 8192, 8, 64, 4),
    *case(_select, FLOAT, 128, 16, on=NONE),
    *case(_select, FLOAT, 256, 3, on=AMPERE_TOO),
    *case(_select, BRAIN, 128, 4, 1 << 18),  # picks from a few segments
    *case(_select, BRAIN, 128, 16, 1 << 20, on=NONE),
    *case(_select_documents, BRAIN, 128, 16),
    *case(_select_documents, HALF, 80, 7, on=AMPERE_TOO),
    *case(_select_pooled, BRAIN, 128, on=EACH),
    *case(_select_pooled, BRAIN, 64, on=EACH),
    *case(_select_pooled, HALF, 256, on=EACH),
    *case(_select_pooled, EIGHT, 128, on=EACH),
    *case(_select_pooled, EIGHT, 64, 4, on=EACH),
    *case(_select_pooled, EIGHT, 16, on=EACH),  # a product takes 32 elements of float8
    *case(_select_pooled, EIGHT, 256, on=EACH),
    *case(_select_pooled, FLOAT, 128, on=EACH),
    *case(_select_pooled, EIGHT, 80, 1, 1 << 18, on=AMPERE_TOO),  # picks from a few segments
    *case(_pool, BRAIN, 128, 16, True, 128, on=EACH),
    *case(_pool, HALF, 80, 3, False, 80, on=EACH),
    *case(_pool, BRAIN, 128, 4, True, 32, on=EACH),
    *case(_cached_pooled, BRAIN, 128, 16, 1, True, on=EACH),
    *case(_cached_pooled, BRAIN, 64, 3, 1, False, on=EACH),
    *case(_cached_pooled, HALF, 256, 4, 5, True, on=EACH),
    *case(_cached_pooled, FLOAT, 128, 3, 1, False, on=EACH),
    *case(_cached_pooled, FLOAT, 256, 4, 5, True, on=EACH),
    *case(_cached_pooled, BRAIN, 128, 4, 1, True, 32, EIGHT, on=EACH),
    *case(_cached_pooled, BRAIN, 80, 16, 5, False, 32, on=EACH),
    *case(_cached_pooled, FLOAT, 256, 4, 1, False, 64, on=EACH),
    *case(_append_slowest, BRAIN, 128, 32, True, on=EACH),
    *case(_append_slowest, HALF, 80, 32, False),
    *case(_select_cached, BRAIN, 128, 16, on=EACH),
    *case(_select_cached, BRAIN, 128, 64),
    *case(_select_cached, BRAIN, 128, 16, 1, 64, 1 << 19),
    *case(_select_cached, BRAIN, 128, 64, 1, 64, 1 << 19),
    *case(_select_cached, BRAIN, 128, 16, 1, 64, 4096),
    *case(_select_cached, HALF, 80, 7, 5, on=AMPERE_TOO),
    *case(_select_cached, HALF, 256, 1, 16),
    *case(_select_cached, BRAIN, 64, 4, 1, 48),
    *case(_select_cached, BRAIN, 128, 16, 1, 64, 32768, FLOAT),  # as autocast leaves a cache
    *case(_select_cached, HALF, 256, 4, 1, 64, 32768, FLOAT),
    *case(_select_cached, BRAIN, 256, 4, 1, 64, 32768, None, (8, 4, 32, 16), on=EACH),
    *case(_select_cached, FLOAT, 64, 4),
    *case(_select_cached, FLOAT, 256, 3, 5, on=AMPERE_TOO),
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


@pytest.mark.parametrize("D", [64, 80, 256])
@pytest.mark.parametrize("kept", [BRAIN, EIGHT], ids=str)
def test_keys_of_a_part_of_the_dims_are_copied_in_the_widest_steps(
    kept: torch.dtype, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> None:
        _cached_pooled(BRAIN, D, 4, 1, True, 32, kept)

    scores = record_launches(monkeypatch, step, 90)[0]
    copies = re.findall(r"cp\.async\.c[ag].*, (\w+), ", compile_kernel(scores, 90).asm["ptx"])
    assert set(copies) == {"0x10"}  # bytes


@pytest.mark.slow  # with the Triton of .venv the tests above compile the same
@pytest.mark.private_api
@pytest.mark.parametrize(
    ("call", "args"),
    [
        (_compress, (BRAIN, 128)),
        (_select, (BRAIN, 128, 16)),
        (_select, (BRAIN, 128, 4)),
        (_select_documents, (BRAIN, 128, 16)),
        (_select_pooled, (BRAIN, 128)),
        (_pool, (BRAIN, 128, 16, True, 128)),
        (_cached_pooled, (BRAIN, 128, 16, 1, True, 32, EIGHT)),
        (_select_cached, (BRAIN, 128, 16)),
    ],
)
def test_another_triton_compiles_every_operator_for_hopper(
    call: Callable[..., None], args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_call(monkeypatch, call, args, 90)


@pytest.mark.parametrize(
    ("dtype", "D", "G", "programs"),
    [(BRAIN, 128, 4, 3), (HALF, 64, 8, 3), (BRAIN, 128, 16, 4), (HALF, 80, 12, 4)],
)
@pytest.mark.parametrize("S", [8192, 1 << 18])
def test_scores_on_hopper_compile_without_spills(
    dtype: torch.dtype, D: int, G: int, programs: int, S: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = record_launches(monkeypatch, lambda: _select(dtype, D, G, S), 90)
    launch = [x for x in launches if x.kernel.__name__ == "score_hopper_kernel"][-1]
    assert (launch.sizes["SEGMENT"] > 0) == (S > 8192)  # long rows are selected from a few
    used = compile_launch(launch, 90)
    assert used.stack == 0
    assert programs * (used.shared + 1024) <= SHARED_LIMIT[90] + 1024  # side by side
    assert programs * used.registers * 128 <= 65536
