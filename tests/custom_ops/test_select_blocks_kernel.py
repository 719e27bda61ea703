"""The Triton kernels of ``select_blocks`` select what the definition selects, ties included.

Queries and keys are small integers, so dot products are exact on both sides and scores that are
not equal lie far apart: rounding of the exponentials then cannot change the selection.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_flex_ops.selection.select_blocks import select_blocks
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
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy

from infllm_flex_ops.selection.kernels.prefill import plan  # noqa: E402
from tests.custom_ops.selection_launches import launch_select  # noqa: E402

RULE = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "coarse_size": 128,
    "coarse_stride": 64,
    "block_size": 64,
    "init_blocks": 1,
    "local_blocks": 2,
    "num_selected": 5,
    "scale": 0.25,
}


def _case(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype = torch.float32, **rule: float
) -> list[Any]:
    """Make the arguments for ``B, Hq, Hkv, Sq, kv_len, D``."""
    B, Hq, Hkv, Sq, kv_len, D = shape
    rule = RULE | rule
    random = torch.Generator().manual_seed(sum(shape))
    values = [
        torch.randint(-3, 4, size, generator=random).to(dtype)
        for size in (
            (B, Hq, Sq, D),
            (B, Hkv, _windows(kv_len, rule["kernel_size"], rule["kernel_stride"]), D),
            (B, Hkv, _windows(kv_len, rule["coarse_size"], rule["coarse_stride"]), D),
        )
    ]
    return [*values, kv_len, *rule.values()]


def _windows(length: int, size: float, stride: float) -> int:
    return max(0, (length - int(size)) // int(stride) + 1)


def _judge(args: list[Any]) -> Tensor:
    actual, expected = run_on_device(launch_select, *args), select_blocks(*args)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, expected)
    return actual


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((1, 4, 2, 90, 700, 40), {}),
        ((2, 1, 1, 70, 900, 16), {}),
        ((1, 3, 1, 33, 600, 80), {}),
        ((1, 14, 2, 20, 1300, 16), {}),
        ((1, 12, 1, 1, 2000, 32), {}),
        ((1, 64, 1, 3, 900, 16), {}),
        ((1, 2, 1, 45, 45, 16), {}),  # every block fits
        ((1, 2, 1, 1, 1, 16), {}),
        ((1, 2, 1, 7, 20, 16), {}),  # no whole window
        ((1, 5, 1, 9, 800, 256), {}),
        ((1, 2, 1, 40, 700, 16), {"init_blocks": 0, "local_blocks": 0, "num_selected": 3}),
        ((1, 4, 1, 40, 700, 16), {"coarse_size": 32, "coarse_stride": 16}),  # exact normaliser
        # The first rows that select see no coarse key.
        ((1, 2, 1, 64, 96, 16), {"block_size": 16, "local_blocks": 0, "num_selected": 2}),
        # Windows that overlap several of the next block's, all of it, and more than all of it.
        ((1, 2, 1, 30, 500, 16), {"kernel_size": 64, "coarse_size": 256}),
        ((1, 2, 1, 30, 500, 16), {"kernel_size": 80, "coarse_size": 320}),
        ((1, 2, 1, 30, 500, 16), {"kernel_size": 96, "block_size": 32}),
        ((1, 2, 1, 30, 400, 16), {"kernel_size": 16, "block_size": 16}),
        ((1, 2, 1, 30, 360, 16), {"kernel_size": 24, "kernel_stride": 12, "block_size": 36}),
    ],
)
def test_equals_the_definition(
    shape: tuple[int, int, int, int, int, int], rule: dict[str, int]
) -> None:
    _judge(_case(shape, **rule))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("group", [1, 7, 16])
def test_equals_the_definition_in_half_precision(group: int, dtype: torch.dtype) -> None:
    _judge(_case((1, group, 1, 20, 1000, 40), dtype))


@pytest.mark.parametrize(
    ("num_blocks", "dtype"),
    [(1030, torch.float16), (4100, torch.float16), (16384, torch.float16), (2050, torch.float32)],
)
def test_long_rows(num_blocks: int, dtype: torch.dtype) -> None:
    """In half precision they are selected from a few segments."""
    shape = (1, 2, 1, 2, num_blocks * 16 - 5, 16)
    rule = {"block_size": 16, "num_selected": 96, "local_blocks": 32}
    _judge(_case(shape, dtype, **rule))


def test_refuses_rows_beyond_the_registers() -> None:
    args = _case((1, 1, 1, 1, 16385 * 16, 16), block_size=16)
    with pytest.raises(NotImplementedError, match="larger block_size"):
        run_on_device(launch_select, *args)


def test_ties_go_to_the_lower_block() -> None:
    args = _case((1, 2, 1, 10, 1000, 16))
    args[1].zero_()  # every window weighs the same
    assert _judge(args)[0, 0, -1].tolist() == [0, 1, 13, 14, 15]
    args = _case((1, 2, 1, 40, 1000, 16))
    args[1][:, :, 1:] = args[1][:, :, :1]
    _judge(args)
    rule = {"block_size": 16, "num_selected": 5, "local_blocks": 0}
    args = _case((1, 2, 1, 20, 2100, 16), torch.float16, **rule)  # from a few segments
    args[1][:, :, ::5] = args[1][:, :, :1] + 1
    _judge(args)


def test_scores_that_underflow_or_overflow() -> None:
    for factor in (1e4, 1e30):
        args = _case((1, 1, 1, 20, 900, 16))
        args[0] = args[0] * factor  # one head: weights are 0, infinite, or in the logits' order
        _judge(args)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, of the interpreter's maximum
@pytest.mark.parametrize("place", ["query", "compressed", "coarse", "everywhere"])
def test_nan_scores_count_as_zero(place: str) -> None:
    args = _case((1, 4, 1, 30, 900, 16))
    if place in ("query", "everywhere"):
        args[0][:, 1, ::3, 5] = torch.nan
    if place in ("compressed", "everywhere"):
        args[1][:, :, 5::7, 2] = torch.nan
    if place in ("coarse", "everywhere"):
        args[2][:, :, 7] = torch.nan
    _judge(args)


def test_takes_any_strides() -> None:
    args = _case((2, 4, 2, 30, 700, 16))
    expected = select_blocks(*args)
    for i in range(3):
        args[i] = args[i].transpose(1, 2).contiguous().transpose(1, 2)
        args[i] = torch.stack([args[i], torch.full_like(args[i], 100)], -1)[..., 0]
    assert torch.equal(run_on_device(launch_select, *args), expected)


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[-1]])
def test_a_row_is_the_same_in_any_company(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    kv_len, S = 700, 24
    q, compressed, coarse = (
        torch.randn(2, n, rows, 16, generator=random).to(dtype)
        for n, rows in ((6, S), (2, _windows(kv_len, 32, 16)), (2, _windows(kv_len, 128, 64)))
    )
    rule = list((RULE | {"scale": 2.0}).values())

    def select(batch: slice, rows: slice) -> Tensor:
        length = kv_len - S + rows.stop
        keys = (
            x[batch, :, : _windows(length, size, stride)]
            for x, size, stride in ((compressed, 32, 16), (coarse, 128, 64))
        )
        return run_on_device(launch_select, q[batch, :, rows], *keys, length, *rule)

    everything = select(slice(None), slice(0, S))
    assert torch.equal(select(slice(1, 2), slice(0, S)), everything[1:])
    for rows in (slice(0, 1), slice(3, 9), slice(22, 23)):
        assert torch.equal(select(slice(0, 1), rows), everything[:1, :, rows])
    for limit in (1, 30_000):
        monkeypatch.setattr(plan, "SCORE_BYTES", limit)
        monkeypatch.setattr(plan, "LSE_BYTES", limit)
        assert torch.equal(select(slice(None), slice(0, S)), everything)


def test_reads_offsets_beyond_32_bits() -> None:
    args = _case((1, 4, 2, 6, 900, 16), torch.float16)
    expected = select_blocks(*args)
    for tensor in range(3):
        for dim in (1, 2):
            far = [
                x.to("cpu" if INTERPRETED else "cuda") if torch.is_tensor(x) else x for x in args
            ]
            far[tensor] = far_apart(args[tensor], dim)
            assert torch.equal(launch_select(*far).cpu(), expected)


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
@pytest.mark.parametrize("shape", [(1, 3, 1, 21, 640, 40), (2, 2, 2, 5, 703, 24)])
def test_touches_nothing_outside(
    shape: tuple[int, int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = _case(shape)
    expected = select_blocks(*args)
    guarded = [fenced(x) if torch.is_tensor(x) else x for x in args]
    with fenced_allocations(monkeypatch):
        actual = launch_select(*guarded)
    assert torch.equal(actual, expected)
