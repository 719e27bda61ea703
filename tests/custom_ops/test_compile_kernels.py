"""Every kernel compiles for four GPUs, sm_80 to sm_100, without spills and within shared memory.

Show what each takes: ``pytest tests/custom_ops/test_compile_kernels.py -s``.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarking.ahead_of_time import (
    SHARED_LIMIT,
    Launch,
    Resources,
    compile_for,
    record_launches,
)
from infllm_flex_ops.block_lists.membership import word_dtype
from infllm_flex_ops.selection.rule import SelectionRule
from tests.custom_ops.harness import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("needs the compiler: unset TRITON_INTERPRET", allow_module_level=True)
# Triton 3.9 announces another default of its own; it does not concern a test of resources.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")

# Bytes that a kernel may spill where it was measured to run faster so: a step of 64 rows spills a
# little and still takes less time than two steps of 32.
_MEASURED_SPILLS = {("dkv_kernel", 90): 160}
# Before Hopper, where a group is no power of two, eight output offsets are kept on the stack: they
# are written before the loop over the list and read after it.
_WAITING_SPILLS = 32
_ADA_SPILLS = 16  # of kernels that do not spill on sm_80, with the same instructions

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
EIGHT = torch.float8_e4m3fn


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _compress(dtype: torch.dtype, D: int) -> None:
    from infllm_flex_ops.selection.kernels.compress_keys import launch

    launch(_meta(1, 2, 4096, D, dtype=dtype), 32, 16)
    launch(_meta(1, 2, 4096, D, dtype=dtype), 128, 64)


def _select(
    dtype: torch.dtype, D: int, G: int, S: int = 8192, size: int = 32, block_size: int = 64
) -> None:
    from infllm_flex_ops.selection.kernels.prefill.launch import launch

    q = _meta(1, 2 * G, S, D, dtype=dtype)
    compressed, coarse = (
        _meta(1, 2, (S - w) // s + 1, D, dtype=dtype) for w, s in ((size, 16), (4 * size, 64))
    )
    rule = SelectionRule(size, 16, 4 * size, 64, block_size, 1, 2048 // block_size, 96)
    launch(q, compressed, coarse, S, rule, D**-0.5)


def _select_pooled(dtype: torch.dtype, D: int, window: int = 1, S: int = 8192) -> None:
    from infllm_flex_ops.selection.kernels.prefill.launch_pooled import launch

    q, keys = _meta(1, 2, S, D, dtype=dtype), _meta(1, 2, S // window, D, dtype=dtype)
    launch(q, keys, S, SelectionRule.from_pooled(window, 64, 1, 4, 96))


def _pool(dtype: torch.dtype, D: int, G: int, float8: bool) -> None:
    from infllm_flex_ops.selection.kernels.pool_queries import launch

    launch(_meta(1, 2 * G, 4096, D, dtype=dtype), 2, float8)


def _cached_pooled(dtype: torch.dtype, D: int, G: int, n: int, float8: bool) -> None:
    from infllm_flex_ops.selection.kernels.decode.launch_pooled import launch

    q, k = _meta(1, 2 * G, n, D, dtype=dtype), _meta(1, 2, 32768, D, dtype=dtype)
    ends = [_meta(1, dtype=torch.int64) for _ in range(2)]
    launch(q, k, *ends, SelectionRule.from_pooled(1, 64, 1, 4, 96), 8192, 128, float8)


def _select_documents(dtype: torch.dtype, D: int, G: int) -> None:
    from infllm_flex_ops.selection.kernels.prefill.launch import launch

    S = 8192
    q = _meta(1, 2 * G, S, D, dtype=dtype)
    compressed, coarse = (
        _meta(1, 2, (S - w) // s + 1, D, dtype=dtype) for w, s in ((32, 16), (128, 64))
    )
    documents = _meta(1, S // 64, 3, dtype=torch.int32)
    rule = SelectionRule(32, 16, 128, 64, 64, 1, 32, 128)
    launch(q, compressed, coarse, S, rule, D**-0.5, documents)


def _tile(tile_tokens: int) -> None:
    from infllm_flex_ops.block_lists.kernels.tile_blocks import launch

    launch(_meta(1, 2, 8192, 96, dtype=torch.int32), 8192, 64, tile_tokens, 128)


def _share(tile_tokens: int) -> None:
    from infllm_flex_ops.block_lists.kernels.split_shared_blocks import launch

    launch(_meta(1, 2, 8192, 96, dtype=torch.int32), 8192, 64, tile_tokens)


def _transpose() -> None:
    from infllm_flex_ops.block_lists.kernels.transpose_blocks import launch

    num, idx = (_meta(1, 2, 1024, *w, dtype=torch.int32) for w in ((), (128,)))
    launch(num, idx, 128)


def _redo(dtype: torch.dtype, D: int, G: int) -> None:
    from infllm_flex_ops.block_attention.kernels.attend_blocks import repair_nonfinite_heads

    q, out = (_meta(1, 2 * G, 4096, D, dtype=dtype) for _ in range(2))
    k, v = (_meta(1, 2, 4096, D, dtype=dtype) for _ in range(2))
    repair_nonfinite_heads(out, q, k, v, _meta(1, 2, 4096, 96, dtype=torch.int32), 64, D**-0.5)


def _attend(dtype: torch.dtype, D: int, G: int, tile_tokens: int, block_size: int = 64) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_blocks, attend_blocks_backward

    S, num_tiles, width = 8192, 8192 // tile_tokens, 128
    q, out, grad_out = (_meta(1, 2 * G, S, D, dtype=dtype) for _ in range(3))
    k, v = (_meta(1, 2, S, D, dtype=dtype) for _ in range(2))
    lse = _meta(1, 2 * G, S, dtype=FLOAT)
    num, idx = (_meta(1, 2, num_tiles, *w, dtype=torch.int32) for w in ((), (width,)))
    lists = num, idx, _meta(*idx.shape, dtype=word_dtype(tile_tokens))
    rest = (block_size, tile_tokens, D**-0.5)
    attend_blocks.launch(q, k, v, *lists, *rest)
    attend_blocks_backward.launch(grad_out, q, k, v, out, lse, *lists, *rest)


def _attend_forward(dtype: torch.dtype, D: int, G: int, tile_tokens: int) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_blocks

    q, (k, v) = _meta(1, 2 * G, 8192, D, dtype=dtype), (_meta(1, 2, 8192, D, dtype=dtype),) * 2
    num, idx = (_meta(1, 2, 8192 // tile_tokens, *w, dtype=torch.int32) for w in ((), (128,)))
    membership = _meta(*idx.shape, dtype=word_dtype(tile_tokens))
    attend_blocks.launch(q, k, v, num, idx, membership, 64, tile_tokens, D**-0.5)


def _cached(
    dtype: torch.dtype,
    D: int,
    G: int,
    n: int = 1,
    block_size: int = 64,
    S: int = 32768,
    key_dtype: torch.dtype | None = None,
) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_cached_blocks
    from infllm_flex_ops.selection.kernels import append_windows
    from infllm_flex_ops.selection.kernels.decode.launch import launch as launch_select

    width = 128
    q = _meta(1, 2 * G, n, D, dtype=dtype)
    k, v = _meta(1, 2, S, D, dtype=key_dtype or dtype), _meta(1, 2, S, D, dtype=dtype)
    windows = [_meta(1, 2, S // stride, D, dtype=dtype) for stride in (16, 64)]
    ends = [_meta(1, dtype=torch.int64) for _ in range(2)]
    selected = _meta(1, 2, n, width, dtype=torch.int32)
    sizes = (32, 16, 128, 64)
    append_windows.launch(k, *windows, *ends, None, None, n, *sizes)
    rule = SelectionRule(*sizes, block_size, 1, 2048 // block_size, 96)
    launch_select(q, *windows, *ends, rule, 8192, width, D**-0.5)
    attend_cached_blocks.launch(q, k, v, selected, *ends, block_size, D**-0.5)


def _paged(dtype: torch.dtype, D: int, G: int, page_size: int = 64, n: int = 1) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_cached_blocks
    from infllm_flex_ops.selection.kernels import append_windows
    from infllm_flex_ops.selection.kernels.decode import launch as select

    rule = SelectionRule(32, 16, 128, 64, 64, 1, 32, 96)
    q = _meta(4, 2 * G, D, dtype=dtype)
    k, v = _meta(2, 4096, 2, page_size, D, dtype=dtype)
    windows = (_meta(4096, 2, entries, D, dtype=dtype) for entries in (page_size // 16, 1))
    compressed, coarse = windows
    where = (_meta(4, 32768 // page_size, dtype=torch.int32), *_meta(2, 4, dtype=torch.int32))
    sizes = (*rule.windows, *rule.coarse_windows)
    append_windows.launch_paged(k, compressed, coarse, *where, n, *sizes)
    select.launch_paged(q, compressed, coarse, *where, rule, 8192, 128, n, D**-0.5)
    selected = _meta(2, 4, 128, dtype=torch.int32)
    attend_cached_blocks.launch_paged(q, k, v, selected, *where, 64, n, D**-0.5)


def _paged_chunk(dtype: torch.dtype, D: int, G: int, page_size: int = 64) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_blocks

    q, (k, v) = _meta(2048, 2 * G, D, dtype=dtype), _meta(2, 1024, 2, page_size, D, dtype=dtype)
    selected, table = (_meta(*x, dtype=torch.int32) for x in ((2, 2048, 128), (1024,)))
    attend_blocks.launch_paged(q, k, v, selected, table, 8192, 64, D**-0.5)


def _paged_pooled(
    dtype: torch.dtype, D: int, G: int, n: int, float8: bool, page_size: int = 64, window: int = 1
) -> None:
    from infllm_flex_ops.selection.kernels.decode.launch_pooled import launch_paged

    q, keys = (
        _meta(*shape, D, dtype=dtype) for shape in ((4, 2 * G), (4096, 2, page_size // window))
    )
    where = (_meta(4, 32768 // page_size, dtype=torch.int32), *_meta(2, 4, dtype=torch.int32))
    rule = SelectionRule.from_pooled(window, 64, 1, 4, 96)
    launch_paged(q, keys, *where, rule, 8192, 128, n, float8)


def _paged_pooled_chunk(
    dtype: torch.dtype,
    D: int,
    float8: bool,
    page_size: int = 64,
    window: int = 1,
    kv_len: int = 8192,
) -> None:
    from infllm_flex_ops.selection.kernels.prefill.launch_pooled import launch_paged

    q = _meta(2, 2048, D, dtype=EIGHT if float8 else dtype)
    keys = _meta(4096, 2, page_size // window, D, dtype=dtype)
    table = _meta(kv_len // page_size, dtype=torch.int32)
    launch_paged(q, keys, table, kv_len, SelectionRule.from_pooled(window, 64, 1, 4, 96))


def _paged_rows(dtype: torch.dtype, D: int, G: int, page_size: int = 64) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_paged_rows

    q, out = _meta(2, 2048, 2 * G, D, dtype=dtype)
    k, v = _meta(2, 1024, 2, page_size, D, dtype=dtype)
    where = (_meta(4, 8192 // page_size, dtype=torch.int32), *_meta(2, 4, dtype=torch.int32))
    attend_paged_rows.launch(q, k, v, out, *where, 0, 4, 64, 17, 1024, 8191, D**-0.5)


def _compile(launch: Launch, capability: int) -> Resources:
    """Compile a launch, and print the resources that it takes."""
    used = compile_for(launch, capability)
    sys.stdout.write(f"sm_{capability} {launch}: {used}\n")
    return used


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(
    ("call", "args"),
    [
        (_compress, (BRAIN, 128)),
        (_compress, (FLOAT, 80)),
        (_select, (BRAIN, 128, 16)),
        pytest.param(_select, (BRAIN, 64, 4), marks=pytest.mark.slow),
        pytest.param(_select, (BRAIN, 128, 64), marks=pytest.mark.slow),
        (_select, (HALF, 80, 7)),
        (_select, (HALF, 256, 1)),
        (_select, (BRAIN, 128, 1)),
        (_select, (HALF, 80, 2)),
        (_select, (BRAIN, 128, 16, 8192, 96, 32)),
        pytest.param(_select, (FLOAT, 128, 16), marks=pytest.mark.slow),
        (_select, (FLOAT, 256, 3)),
        (_select, (BRAIN, 128, 4, 1 << 18)),  # picks from a few segments
        pytest.param(_select, (BRAIN, 128, 16, 1 << 20), marks=pytest.mark.slow),
        (_select_documents, (BRAIN, 128, 16)),
        (_select_documents, (HALF, 80, 7)),
        (_select_pooled, (BRAIN, 128)),
        (_select_pooled, (BRAIN, 64)),
        (_select_pooled, (HALF, 256)),
        (_select_pooled, (EIGHT, 128)),
        (_select_pooled, (EIGHT, 64, 4)),
        (_select_pooled, (EIGHT, 16)),  # a matrix instruction multiplies 32 elements of float8
        (_select_pooled, (EIGHT, 256)),
        (_select_pooled, (FLOAT, 128)),
        (_select_pooled, (EIGHT, 80, 1, 1 << 18)),  # picks from a few segments
        (_pool, (BRAIN, 128, 16, True)),
        (_pool, (HALF, 80, 3, False)),
        (_cached_pooled, (BRAIN, 128, 16, 1, True)),
        (_cached_pooled, (BRAIN, 64, 3, 1, False)),
        (_cached_pooled, (HALF, 256, 4, 5, True)),
        (_cached_pooled, (FLOAT, 128, 3, 1, False)),
        (_cached_pooled, (FLOAT, 256, 4, 5, True)),
        (_tile, (1,)),
        (_tile, (8,)),
        (_tile, (32,)),
        (_share, (8,)),
        (_transpose, ()),
        (_cached, (BRAIN, 128, 16)),
        (_cached, (BRAIN, 128, 64)),
        (_cached, (BRAIN, 128, 16, 1, 64, 1 << 19)),
        (_cached, (BRAIN, 128, 64, 1, 64, 1 << 19)),
        (_cached, (BRAIN, 128, 16, 1, 64, 4096)),
        (_cached, (HALF, 80, 7, 5)),
        (_cached, (HALF, 256, 1, 16)),
        (_cached, (BRAIN, 64, 4, 1, 48)),
        (_cached, (BRAIN, 128, 16, 1, 64, 32768, FLOAT)),  # as autocast leaves a cache
        (_cached, (HALF, 256, 4, 1, 64, 32768, FLOAT)),
        (_cached, (FLOAT, 64, 4)),
        (_cached, (FLOAT, 256, 3, 5)),
        (_paged, (BRAIN, 128, 16)),
        (_paged, (BRAIN, 64, 4, 128, 4)),
        (_paged, (HALF, 128, 1, 16)),  # a block of four pages
        pytest.param(_paged, (HALF, 80, 7, 16, 16), marks=pytest.mark.slow),
        pytest.param(_paged, (FLOAT, 128, 4), marks=pytest.mark.slow),
        (_paged_pooled, (BRAIN, 128, 16, 1, True)),
        (_paged_pooled, (BRAIN, 64, 4, 4, False, 128)),
        (_paged_pooled, (HALF, 128, 1, 1, True, 16)),  # a block of four pages
        (_paged_pooled, (HALF, 256, 4, 16, True)),
        (_paged_pooled, (FLOAT, 128, 3, 1, False)),
        pytest.param(_paged_pooled, (BRAIN, 80, 7, 16, True, 16, 4), marks=pytest.mark.slow),
        pytest.param(_paged_pooled, (FLOAT, 256, 4, 5, True), marks=pytest.mark.slow),
        (_paged_pooled_chunk, (BRAIN, 128, True)),
        (_paged_pooled_chunk, (BRAIN, 128, False, 128)),
        (_paged_pooled_chunk, (BRAIN, 64, True, 16)),
        (_paged_pooled_chunk, (HALF, 256, True)),
        (_paged_pooled_chunk, (HALF, 256, False, 16)),
        (_paged_pooled_chunk, (FLOAT, 128, True)),
        (_paged_pooled_chunk, (FLOAT, 128, False)),
        (_paged_pooled_chunk, (BRAIN, 80, True, 64, 4, 1 << 18)),  # picks from a few segments
        pytest.param(_paged_pooled_chunk, (FLOAT, 256, True), marks=pytest.mark.slow),
        pytest.param(_paged_pooled_chunk, (BRAIN, 64, False, 64), marks=pytest.mark.slow),
        (_paged_chunk, (BRAIN, 128, 16)),
        (_paged_chunk, (HALF, 64, 4, 128)),
        pytest.param(_paged_chunk, (BRAIN, 128, 1, 16), marks=pytest.mark.slow),
        pytest.param(_paged_chunk, (FLOAT, 128, 4), marks=pytest.mark.slow),
        (_paged_rows, (BRAIN, 128, 16)),
        (_paged_rows, (BRAIN, 128, 4, 16)),
        (_paged_rows, (HALF, 64, 1, 128)),
        pytest.param(_paged_rows, (HALF, 80, 7), marks=pytest.mark.slow),
        pytest.param(_paged_rows, (HALF, 256, 2), marks=pytest.mark.slow),
        pytest.param(_paged_rows, (FLOAT, 128, 4), marks=pytest.mark.slow),
        (_redo, (BRAIN, 128, 16)),
        (_attend, (BRAIN, 128, 16, 8)),
        (_attend, (BRAIN, 128, 16, 4)),
        (_attend, (BRAIN, 64, 4, 16)),
        (_attend, (BRAIN, 64, 4, 32)),
        (_attend, (BRAIN, 128, 1, 64)),
        (_attend, (HALF, 40, 3, 8)),
        (_attend, (HALF, 80, 7, 8)),
        (_attend, (BRAIN, 128, 7, 8)),
        (_attend, (HALF, 256, 2, 32)),
        (_attend, (BRAIN, 128, 2, 16, 36)),
        (_attend, (FLOAT, 128, 2, 16)),
        (_attend, (FLOAT, 256, 2, 16)),
    ],
)
def test_compiles_without_spills(
    call: Callable[..., None],
    args: tuple[Any, ...],
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for launch in record_launches(monkeypatch, lambda: call(*args), capability):
        used = _compile(launch, capability)
        allowed = _ADA_SPILLS if capability == 89 else 0
        G = launch.sizes.get("G", 1)
        walks = launch.kernel.__name__ in ("attend_kernel", "dq_kernel")
        if walks and capability < 90 and G & (G - 1):
            allowed = _WAITING_SPILLS
        allowed = _MEASURED_SPILLS.get((launch.kernel.__name__, capability), allowed)
        assert used.stack <= allowed, f"{launch} spills"
        assert used.shared <= SHARED_LIMIT[capability]


@pytest.mark.slow  # with the Triton of .venv the test above compiles the same
@pytest.mark.private_api
@pytest.mark.parametrize(
    ("call", "args"),
    [
        (_compress, (BRAIN, 128)),
        (_select, (BRAIN, 128, 16)),
        (_select, (BRAIN, 128, 4)),
        (_select_documents, (BRAIN, 128, 16)),
        (_select_pooled, (BRAIN, 128)),
        (_pool, (BRAIN, 128, 16, True)),
        (_cached_pooled, (BRAIN, 128, 16, 1, True)),
        (_tile, (8,)),
        (_share, (8,)),
        (_transpose, ()),
        (_cached, (BRAIN, 128, 16)),
        (_redo, (BRAIN, 128, 16)),
        (_attend, (BRAIN, 128, 16, 8)),
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
    for launch in record_launches(monkeypatch, lambda: call(*args), 90):
        _compile(launch, 90)


@pytest.mark.parametrize(
    "args", [(HALF, 80, 7, 18), (BRAIN, 128, 2, 64), (BRAIN, 64, 3, 42), (BRAIN, 128, 128, 1)]
)
def test_tiles_of_two_warpgroups_compile_without_spills(
    args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = record_launches(monkeypatch, lambda: _attend_forward(*args), 90)
    assert launches[0].kernel.__name__ == "attend_specialized_kernel"
    used = _compile(launches[0], 90)
    assert used.stack == 0
    assert used.shared <= SHARED_LIMIT[90]


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
    used = _compile(launch, 90)
    assert used.stack == 0
    assert programs * (used.shared + 1024) <= SHARED_LIMIT[90] + 1024  # side by side
    assert programs * used.registers * 128 <= 65536
