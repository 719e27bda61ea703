"""The Triton kernels of ``select_blocks_pooled`` select what the definition selects, ties included.

Queries and keys are small integers, so that dot products are exact on both sides.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_flex_ops.selection.select_blocks_pooled import select_blocks_pooled
from tests.custom_ops.harness import (
    DTYPES,
    INTERPRETED,
    far_apart,
    fenced,
    fenced_allocations,
    require_kernels,
    run_on_device,
)

require_kernels()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # by numpy
]

from infllm_flex_ops.selection.kernels.prefill import plan  # noqa: E402
from tests.custom_ops.selection_launches import launch_select_pooled  # noqa: E402

RULE = {"window": 1, "block_size": 64, "init_blocks": 1, "local_blocks": 2, "num_selected": 5}
# Numpy, which interprets the kernels, knows no float8.
LOW = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def _case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32, **rule: int
) -> list[Any]:
    """Make the arguments for ``B, Hkv, Sq, kv_len, D``."""
    B, Hkv, Sq, kv_len, D = shape
    rule = RULE | rule
    random = torch.Generator().manual_seed(sum(shape))
    sizes = (B, Hkv, Sq, D), (B, Hkv, kv_len // rule["window"], D)
    values = [torch.randint(-3, 4, size, generator=random).to(dtype) for size in sizes]
    return [*values, kv_len, *rule.values()]


def _judge(args: list[Any]) -> Tensor:
    actual, expected = run_on_device(launch_select_pooled, *args), select_blocks_pooled(*args)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, expected)
    return actual


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((1, 2, 40, 500, 40), {}),
        ((2, 1, 9, 600, 16), {}),
        ((1, 1, 1, 900, 80), {}),
        ((1, 1, 45, 45, 16), {}),  # every block fits
        ((1, 1, 1, 1, 16), {}),
        ((1, 1, 5, 500, 256), {}),
        ((1, 1, 9, 500, 16), {"init_blocks": 0, "local_blocks": 0, "num_selected": 3}),
        ((1, 1, 40, 300, 16), {"block_size": 16}),
        ((1, 1, 9, 700, 16), {"window": 4}),
        ((1, 1, 9, 900, 16), {"window": 64}),
        ((1, 1, 9, 500, 16), {"window": 3, "block_size": 36}),
        ((1, 1, 9, 900, 16), {"block_size": 128}),
    ],
)
def test_equals_the_definition(shape: tuple[int, int, int, int, int], rule: dict[str, int]) -> None:
    _judge(_case(shape, **rule))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("D", [40, 128])
def test_equals_the_definition_in_low_precision(D: int, dtype: torch.dtype) -> None:
    _judge(_case((1, 1, 20, 600, D), dtype))


@pytest.mark.parametrize("num_blocks", [1030, 2100])
@pytest.mark.parametrize("dtype", DTYPES[1:2])
def test_long_rows_are_selected_from_segments(num_blocks: int, dtype: torch.dtype) -> None:
    rule = {"window": 4, "block_size": 16, "num_selected": 96, "local_blocks": 32}
    _judge(_case((1, 1, 3, num_blocks * 16 - 5, 16), dtype, **rule))


def test_chunks_of_a_small_workspace_select_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    args = _case((2, 2, 40, 500, 16))
    expected = select_blocks_pooled(*args)
    for limit in (1, 100_000):
        monkeypatch.setattr(plan, "SCORE_BYTES", limit)
        assert torch.equal(run_on_device(launch_select_pooled, *args), expected)


def test_documents_select_as_if_alone() -> None:
    table = [[0, 130, 3], [0, 130, 3], [0, 130, 3], [192, 200, 5], [0, 0, 0], [320, 512, 3]]
    table += [[320, 512, 3]] * 2
    documents = torch.tensor([table], dtype=torch.int32)
    _judge([*_case((1, 1, 512, 512, 16), torch.float16), documents])


def test_nan_and_infinity_rank_as_in_the_definition() -> None:
    args = _case((1, 1, 20, 900, 16))
    keys = args[1]
    keys[0, 0, 100] = torch.nan
    keys[0, 0, 210] = torch.inf
    keys[0, 0, 330] = -torch.inf
    keys[0, 0, 128:192] = torch.nan
    _judge(args)


@pytest.mark.skipif(not INTERPRETED, reason="the fence stands in the CPU's memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reads_nothing_out_of_bounds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    args = _case((1, 1, 9, 573, 24), dtype)
    fences = [fenced(x) if isinstance(x, Tensor) else x for x in args]
    with fenced_allocations(monkeypatch):
        actual = launch_select_pooled(*fences)
    assert torch.equal(actual, select_blocks_pooled(*args))


@pytest.mark.parametrize("which", [0, 1])
def test_offsets_beyond_32_bits(which: int) -> None:
    args = _case((1, 2, 5, 700, 16), torch.float16)
    expected = select_blocks_pooled(*args)
    args[which] = far_apart(args[which], 1)
    assert torch.equal(run_on_device(launch_select_pooled, *args), expected)


def test_refuses_what_does_not_fit_the_registers() -> None:
    args = _case((1, 1, 1, 16385 * 4, 16), block_size=4)
    with pytest.raises(NotImplementedError, match="at most 16384 blocks on CUDA, got 16385"):
        launch_select_pooled(*args)
    args = _case((1, 1, 1, 2048, 16), block_size=512)
    with pytest.raises(NotImplementedError, match="at most 256 windows to a block"):
        launch_select_pooled(*args)
