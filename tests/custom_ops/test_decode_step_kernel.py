"""The kernels of a decode step do what its definition does, in rows of every kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_flex.decoding.attention import list_width
from infllm_flex_ops import append_windows, attend_cached_blocks, decode_step, select_cached_blocks
from tests.custom_ops.cached import make_cache
from tests.custom_ops.harness import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    fenced,
    fenced_allocations,
    require_kernels,
)
from tests.inputs import small_config
from tests.tolerance import assert_within_rounding

require_kernels()
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy

from infllm_flex_ops.block_attention.kernels import decode_step as kernels  # noqa: E402

# The last token completes windows of both levels, of one, or of none; one token; no token.
ROWS = [(0, 240), (4, 240), (3, 240), (150, 231), (229, 230), (230, 230), (0, 17)]
FEW = [(0, 240), (4, 240), (230, 230)]


def step_args(
    rows: list[tuple[int, int]] = ROWS, num_new: int = 1, shape: Any = None, **settings: Any
) -> list[Any]:
    """Arguments of a step that appends the last ``num_new`` tokens of each row."""
    config = small_config(**settings)
    q, k, v, state = make_cache(config, rows, 240, whole_numbers=True, **(shape or {}))
    state.end.sub_(num_new)
    coarse = None if state.coarse is state.compressed else state.coarse
    bounds = state.start, state.end, None, None, num_new
    rest = config.dense_len, list_width(config, 240), 0.25
    return [q, k, v, state.compressed, coarse, *bounds, *state.rule, *rest]


def launch(args: list[Any]) -> Tensor:
    return decode_step.launcher()(*decode_step.pack(*args))


def judge(args: list[Any]) -> Tensor:
    """Compare what is written with the definitions, and the output by their choice in float64."""
    ours = [x.to(DEVICE, copy=True) if isinstance(x, Tensor) else x for x in args]
    out = launch(ours).cpu()
    q, k, v, compressed, coarse, start, end, *new = args[:10]
    append_windows(k, compressed, coarse, start, end, *new, *args[10:14])
    for mine, theirs in zip(ours[3:7], args[3:7], strict=True):
        assert theirs is None or torch.equal(mine.cpu(), theirs)
    windows = compressed, compressed if coarse is None else coarse
    selected = select_cached_blocks(q, *windows, start, end, *args[10:])
    rest = selected, start, end, args[14], args[-1]
    exact = attend_cached_blocks(q.double(), k.double(), v.double(), *rest)
    assert_within_rounding(out, exact, attend_cached_blocks(q, k, v, *rest))
    return out


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({}, {}),
        ({"Hq": 14}, {"dense_len": 100}),
        ({"Hq": 6, "D": 40}, {"lse": "exact", "init_blocks": 0}),
        ({"Hq": 64, "Hkv": 1, "D": 64}, {"dense_len": 231}),
        ({"Hq": 1, "Hkv": 1, "D": 128}, {"kernel_size": 12, "topk": 2, "window_size": 16}),
        ({}, {"kernel_size": 32, "kernel_stride": 16, "window_size": 0, "topk": 2}),
        ({}, {"kernel_size": 128, "kernel_stride": 4, "topk": 2}),
        ({}, {"topk": 60}),  # all rows list every block
    ],
)
def test_a_step_appends_selects_and_attends(
    shape: dict[str, Any], settings: dict[str, Any]
) -> None:
    judge(step_args(FEW if settings else ROWS, shape=shape, **settings))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("D", [40, 256])
def test_half_precision(D: int, dtype: torch.dtype) -> None:
    judge(step_args(FEW, shape={"dtype": dtype, "Hq": 10, "D": D}))


@pytest.mark.parametrize("num_new", [0, 9])
def test_other_numbers_of_new_slots(num_new: int) -> None:
    judge(step_args(FEW, num_new))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("new_start", "new_end"), [(None, [230]), ([4, 0, 3], None), ([4], [180])])
def test_bounds_become_what_is_given(
    new_start: list[int] | None, new_end: list[int] | None, dtype: torch.dtype
) -> None:
    args = step_args([(0, 240), (4, 200), (4, 240)])
    for x in args[1:3]:
        x.nan_to_num_()
    args[7:9] = [None if x is None else torch.tensor(x, dtype=dtype) for x in (new_start, new_end)]
    judge(args)


@pytest.mark.parametrize("wide", [(1,), (2,), (1, 2)], ids=["keys", "values", "both"])
def test_reads_what_autocast_leaves_in_float32(wide: tuple[int, ...]) -> None:
    args = step_args(FEW, shape={"dtype": torch.float16})
    for i in wide:
        args[i] = args[i].float()
    judge(args)


@pytest.mark.parametrize(
    "sizes",
    [
        {"_PROGRAMS": 1},
        {"_MAX_SPLITS": 2, "_JOINED": 16},
        {"_MAX_SPLITS": 128, "_JOINING_PROGRAMS": 10_000, "_MIN_PART": 16},
    ],
    ids=str,
)
def test_any_number_of_programs_joins(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = step_args(FEW, shape={"D": 40})
    for name, size in sizes.items():
        monkeypatch.setattr(kernels, name, size)
    judge(args)


def test_a_step_repeats_its_bits() -> None:
    """The counters of one step are not those of another."""
    first, second = (judge(step_args(FEW[1:])) for _ in range(2))
    assert torch.equal(first, second)


def test_any_strides() -> None:
    args = step_args(FEW, shape={"Hq": 6})
    for i in range(5):
        args[i] = args[i].transpose(1, 2).contiguous().transpose(1, 2)
    judge(args)


@pytest.mark.parametrize(
    ("lists", "width", "block_d"), [(2, 128, 128), (1, 96, 64), (128, 128, 128), (4096, 5, 16)]
)
def test_the_plan_covers_lists_and_values(lists: int, width: int, block_d: int) -> None:
    plan = kernels.plan_attention(lists, width, 96, block_d)
    assert 1 <= plan.splits <= min(width, 96)
    assert block_d % plan.parts == 0
    assert plan.parts + 1 <= kernels.COUNTERS


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
def test_touches_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    args = step_args([(0, 240), (3, 240)], shape={"D": 24})
    expected = decode_step(*[x.clone() if isinstance(x, Tensor) else x for x in args])
    guarded = [fenced(x) if isinstance(x, Tensor) else x for x in args]
    with fenced_allocations(monkeypatch):
        out = launch(guarded)
    torch.testing.assert_close(out, expected)
