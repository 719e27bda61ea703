"""Every kernel of attention and its lists compiles for four GPUs, without spills.

Show what each takes: ``pytest tests/custom_ops/test_compile_attention.py -s``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarking.ahead_of_time import SHARED_LIMIT, record_launches
from infllm_flex_ops.block_lists.membership import count_words, word_dtype
from tests.custom_ops.compiled import (
    ADA_TOO,
    AMPERE_TOO,
    BRAIN,
    EACH,
    FLOAT,
    HALF,
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


def _tile(tile_tokens: int) -> None:
    from infllm_flex_ops.block_lists.kernels.tile_blocks import launch

    launch(meta(1, 2, 8192, 96, dtype=torch.int32), 8192, 64, tile_tokens, 128)


def _tile_together(tile_tokens: int) -> None:
    from infllm_flex_ops.block_lists.kernels.tile_blocks import launch

    launch(meta(1, 2, 8192, 96, dtype=torch.int32), 8192, 64, tile_tokens, 128, False)


def _share(tile_tokens: int) -> None:
    from infllm_flex_ops.block_lists.kernels.split_shared_blocks import launch

    launch(meta(1, 2, 8192, 96, dtype=torch.int32), 8192, 64, tile_tokens)


def _transpose() -> None:
    from infllm_flex_ops.block_lists.kernels.transpose_blocks import launch

    num, idx = (meta(1, 2, 1024, *w, dtype=torch.int32) for w in ((), (128,)))
    launch(num, idx, 128)


def _redo(dtype: torch.dtype, D: int, G: int) -> None:
    from infllm_flex_ops.block_attention.kernels.attend_blocks import repair_nonfinite_heads

    q, out = (meta(1, 2 * G, 4096, D, dtype=dtype) for _ in range(2))
    k, v = (meta(1, 2, 4096, D, dtype=dtype) for _ in range(2))
    repair_nonfinite_heads(out, q, k, v, meta(1, 2, 4096, 96, dtype=torch.int32), 64, D**-0.5)


def _attend(dtype: torch.dtype, D: int, G: int, tile_tokens: int, block_size: int = 64) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_blocks, attend_blocks_backward

    S, num_tiles, width = 8192, 8192 // tile_tokens, 128
    q, out, grad_out = (meta(1, 2 * G, S, D, dtype=dtype) for _ in range(3))
    k, v = (meta(1, 2, S, D, dtype=dtype) for _ in range(2))
    lse = meta(1, 2 * G, S, dtype=FLOAT)
    num, idx = (meta(1, 2, num_tiles, *w, dtype=torch.int32) for w in ((), (width,)))
    lists = num, idx, meta(*idx.shape, dtype=word_dtype(tile_tokens))
    rest = (block_size, tile_tokens, D**-0.5)
    attend_blocks.launch(q, k, v, *lists, *rest)
    attend_blocks_backward.launch(grad_out, q, k, v, out, lse, *lists, *rest)


def _differentiate(dtype: torch.dtype, D: int, G: int, tile_tokens: int) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_blocks_backward

    q, out, grad_out = (meta(1, 2 * G, 8192, D, dtype=dtype) for _ in range(3))
    k, v = (meta(1, 2, 8192, D, dtype=dtype) for _ in range(2))
    lse, selected = meta(1, 2 * G, 8192, dtype=FLOAT), meta(1, 2, 8192, 96, dtype=torch.int32)
    num, idx = (meta(1, 2, 8192 // tile_tokens, *w, dtype=torch.int32) for w in ((), (128,)))
    lists = num, idx, meta(*idx.shape, dtype=word_dtype(tile_tokens))
    rest = (64, tile_tokens, D**-0.5, selected)
    attend_blocks_backward.launch(grad_out, q, k, v, out, lse, *lists, *rest)


def _attend_forward(dtype: torch.dtype, D: int, G: int, tile_tokens: int) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_blocks

    q, (k, v) = meta(1, 2 * G, 8192, D, dtype=dtype), (meta(1, 2, 8192, D, dtype=dtype),) * 2
    tiles = -(-8192 // tile_tokens)
    num, idx = (meta(1, 2, tiles, *w, dtype=torch.int32) for w in ((), (128,)))
    words = 128 * count_words(tile_tokens)
    membership = meta(1, 2, tiles, words, dtype=word_dtype(tile_tokens))
    attend_blocks.launch(q, k, v, num, idx, membership, 64, tile_tokens, D**-0.5)


def _attend_cached(
    dtype: torch.dtype,
    D: int,
    G: int,
    n: int = 1,
    block_size: int = 64,
    key_dtype: torch.dtype | None = None,
) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_cached_blocks

    q, S = meta(1, 2 * G, n, D, dtype=dtype), 32768
    k, v = meta(1, 2, S, D, dtype=key_dtype or dtype), meta(1, 2, S, D, dtype=dtype)
    ends = [meta(1, dtype=torch.int64) for _ in range(2)]
    selected = meta(1, 2, n, 128, dtype=torch.int32)
    attend_cached_blocks.launch(q, k, v, selected, *ends, block_size, D**-0.5)


CASES: list[Any] = [
    *case(_tile, 1, on=EACH),
    *case(_tile, 8, on=EACH),
    *case(_tile, 32, on=EACH),
    *case(_tile_together, 128),
    *case(_share, 8, on=EACH),
    *case(_transpose, on=EACH),
    *case(_attend_cached, BRAIN, 128, 16, on=EACH),
    *case(_attend_cached, BRAIN, 128, 64),
    *case(_attend_cached, HALF, 80, 7, 5, on=AMPERE_TOO),
    *case(_attend_cached, HALF, 256, 1, 16),
    *case(_attend_cached, BRAIN, 64, 4, 1, 48),
    *case(_attend_cached, BRAIN, 128, 16, 1, 64, FLOAT),  # as autocast leaves a cache
    *case(_attend_cached, HALF, 256, 4, 1, 64, FLOAT, on=ADA_TOO),
    *case(_attend_cached, FLOAT, 64, 4),
    *case(_attend_cached, FLOAT, 256, 3, 5, on=AMPERE_TOO),
    *case(_redo, BRAIN, 128, 16, on=EACH),
    *case(_attend, BRAIN, 128, 16, 8, on=EACH),
    *case(_attend, BRAIN, 128, 16, 4),
    *case(_attend, BRAIN, 64, 4, 16),
    *case(_attend, BRAIN, 64, 4, 32),
    *case(_attend, BRAIN, 128, 1, 64),
    *case(_attend, HALF, 40, 3, 8),
    *case(_attend, HALF, 80, 7, 8, on=AMPERE_TOO),
    *case(_attend, BRAIN, 128, 7, 8),
    *case(_attend, HALF, 256, 2, 32, on=ADA_TOO),
    *case(_attend, BRAIN, 128, 2, 16, 36),
    *case(_attend, FLOAT, 128, 2, 16),
    *case(_attend, FLOAT, 256, 2, 16),
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
        (_tile, (8,)),
        (_share, (8,)),
        (_transpose, ()),
        (_attend_cached, (BRAIN, 128, 16)),
        (_redo, (BRAIN, 128, 16)),
        (_attend, (BRAIN, 128, 16, 8)),
    ],
)
def test_another_triton_compiles_every_operator_for_hopper(
    call: Callable[..., None], args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_call(monkeypatch, call, args, 90)


@pytest.mark.parametrize(
    "args",
    [
        (HALF, 80, 7, 18),
        (BRAIN, 128, 2, 64),
        (BRAIN, 64, 3, 42),
        (BRAIN, 128, 128, 1),
        (BRAIN, 128, 1, 128),  # two words
        (BRAIN, 128, 3, 64),  # three warpgroups from here on
        (BRAIN, 128, 4, 48),
        (HALF, 80, 7, 27),
        (BRAIN, 64, 8, 24),
        (BRAIN, 128, 16, 12),
        (BRAIN, 128, 33, 5),
    ],
)
def test_tiles_of_several_warpgroups_compile_without_spills(
    args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = record_launches(monkeypatch, lambda: _attend_forward(*args), 90)
    assert launches[0].kernel.__name__ == "attend_specialized_kernel"
    used = compile_launch(launches[0], 90)
    assert used.stack == 0
    assert used.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize(
    "args", [(BRAIN, 128, 4, 16), (BRAIN, 128, 3, 16), (BRAIN, 128, 2, 32), (HALF, 64, 8, 8)]
)
def test_gathered_tokens_compile_without_spills(
    args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = record_launches(monkeypatch, lambda: _differentiate(*args), 90)
    assert args[3] == launches[-2].arguments["TILE"].GATHERED
    assert_no_spills(monkeypatch, _differentiate, args, 90)
