"""The Triton kernels that decode do what their definitions do, in rows of every kind."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infllm_flex.decoding import select_cached
from infllm_flex.selection import selection_rule
from infllm_flex_ops import append_windows, attend_cached_blocks, select_cached_blocks
from infllm_flex_ops.device import knows_float8
from tests.custom_ops.cached import make_cache
from tests.custom_ops.harness import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    fenced,
    fenced_allocations,
    require_kernels,
    run_on_device,
)
from tests.inputs import make_qkv, small_config
from tests.tolerance import assert_within_rounding

require_kernels()
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy

from infllm_flex_ops.block_attention.kernels.attend_cached_blocks import launch as launch_attend  # noqa: E402
from infllm_flex_ops.selection.kernels.append_windows import launch as launch_append  # noqa: E402
from tests.custom_ops.selection_launches import launch_select_cached  # noqa: E402

ROWS = [(0, 230), (3, 230), (150, 230), (229, 230), (230, 230), (0, 17)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_new", "D"), [(1, 16), (4, 16), (9, 40), (240, 16)])
def test_append_writes_what_the_definition_writes(num_new: int, D: int, dtype: torch.dtype) -> None:
    k = make_qkv(240, B=6, D=D, dtype=dtype)[1]
    start, end = (torch.tensor(x) for x in zip(*ROWS, strict=True))
    expected = [torch.full((6, 2, C, D), 7.0, dtype=dtype) for C in (60, 14)]
    expected += [start, end - num_new]
    ours = [x.to(DEVICE, copy=True) for x in expected]
    rest = (None, None, num_new, 8, 4, 32, 16)
    append_windows(k, *expected, *rest)
    launch_append(k.to(DEVICE), *ours, *rest)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    alone = torch.full((6, 2, 60, D), 7.0, dtype=dtype, device=DEVICE)
    counters = [x.to(DEVICE, copy=True) for x in (start, end - num_new)]
    launch_append(k.to(DEVICE), alone, None, *counters, *rest)
    assert torch.equal(alone.cpu(), expected[0])


@pytest.mark.parametrize("kept", [*DTYPES[:1], torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("num_new", "size", "D", "num_dims"), [(1, 1, 24, 8), (240, 1, 80, 32), (9, 4, 16, 4)]
)
def test_append_writes_the_slowest_dims_as_the_definition_does(
    num_new: int, size: int, D: int, num_dims: int, kept: torch.dtype
) -> None:
    if kept.itemsize == 1 and DEVICE != "cpu" and not knows_float8(torch.empty(0, device=DEVICE)):
        pytest.skip("no float8 on this GPU")
    k = make_qkv(240, B=6, D=D, dtype=DTYPES[0])[1] * 100  # some are beyond the largest float8
    start, end = (torch.tensor(x) for x in zip(*ROWS, strict=True))
    expected = [torch.full((6, 2, 243, num_dims), 7.0).to(kept), None, start, end - num_new]
    ours = [x if x is None else x.to(DEVICE, copy=True) for x in expected]
    rest = (None, None, num_new, size, size, 32, 16)
    append_windows(k, *expected, *rest)
    launch_append(k.to(DEVICE), *ours, *rest)
    assert torch.equal(ours[0].cpu().float(), expected[0].float())


@pytest.mark.parametrize(
    ("num_new", "Hkv", "new_start", "new_end"),
    [
        (3, 1, None, [200]),
        (40, 2, [0, 3], [200]),
        (4, 9, [0, 3], [200, 190]),
        (90, 9, [2], None),
        (1, 2, [5, 40], None),
    ],
)
def test_append_takes_counters_over(
    num_new: int, Hkv: int, new_start: list[int] | None, new_end: list[int] | None
) -> None:
    k = make_qkv(240, B=2, Hkv=Hkv, Hq=Hkv, dtype=torch.float32)[1]
    expected = [torch.full((2, Hkv, C, 16), 7.0) for C in (60, 14)]
    expected += [torch.tensor([5, 5]), torch.tensor([100, 101])]
    ours = [x.to(DEVICE, copy=True) for x in expected]
    new = [None if x is None else torch.tensor(x) for x in (new_start, new_end)]
    append_windows(k, *expected, *new, num_new, 8, 4, 32, 16)
    new = [x if x is None else x.to(DEVICE) for x in new]
    launch_append(k.to(DEVICE), *ours, *new, num_new, 8, 4, 32, 16)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


def _select_case(n: int, shape: dict[str, Any], **settings: Any) -> list[Any]:
    config = small_config(**settings)
    q, _, _, state = make_cache(config, ROWS, 240, n=n, whole_numbers=True, **shape)
    width = max(config.num_selected, -(-min(config.dense_len - 1, 240) // config.block_size))
    tensors = (q, state.compressed, state.coarse, state.start, state.end)
    return [*tensors, *selection_rule(config), config.dense_len, width, 0.25]


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({}, {}),
        ({"Hq": 14}, {"dense_len": 100}),
        ({"Hq": 6, "D": 40}, {"lse": "exact", "init_blocks": 0}),
        ({"Hq": 64, "Hkv": 1}, {"dense_len": 231}),
        ({"Hq": 1, "Hkv": 1}, {"kernel_size": 12, "topk": 2, "window_size": 16}),
        ({}, {"kernel_size": 32, "kernel_stride": 16, "window_size": 0, "topk": 2}),
        # A row sees no coarse key before its 512th token.
        ({}, {"kernel_size": 128, "kernel_stride": 4, "topk": 2}),
    ],
)
def test_select_selects_what_the_definition_selects(
    n: int, shape: dict[str, Any], settings: dict[str, Any]
) -> None:
    args = _select_case(n, shape, **settings)
    assert torch.equal(run_on_device(launch_select_cached, *args), select_cached_blocks(*args))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_select_in_half_precision(dtype: torch.dtype) -> None:
    args = _select_case(2, {"dtype": dtype, "Hq": 10})
    assert torch.equal(run_on_device(launch_select_cached, *args), select_cached_blocks(*args))


def test_select_joins_many_runs_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    from infllm_flex_ops.selection.kernels.decode import launch as kernels

    # Windows of few tokens, so that some hundred of them fill several runs.
    args = _select_case(3, {}, kernel_size=2, kernel_stride=1, topk=3)
    expected = select_cached_blocks(*args)
    for programs, runs in ((1, 64), (1024, 64), (1024, 2)):
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        monkeypatch.setattr(kernels, "_MAX_RUNS", runs)
        assert torch.equal(run_on_device(launch_select_cached, *args), expected)


def _attend_case(n: int, dtype: torch.dtype = torch.float32, **shape: int) -> list[Any]:
    q, k, v, state = make_cache(small_config(dense_len=100), ROWS, 240, n=n, dtype=dtype, **shape)
    return [q, k, v, select_cached(q, state, capacity=240), state.start, state.end, 16, 0.25]


def _judge_attention(args: list[Any]) -> None:
    q, k, v = args[:3]
    rest = args[3:]
    exact = attend_cached_blocks(q.double(), k.double(), v.double(), *rest)
    plain = attend_cached_blocks(*args)
    assert_within_rounding(run_on_device(launch_attend, *args), exact, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "shape"), [(1, {}), (3, {"Hq": 14, "D": 40}), (1, {"Hq": 64, "Hkv": 1}), (2, {"D": 24})]
)
def test_attend_is_as_exact_as_the_definition(
    n: int, shape: dict[str, int], dtype: torch.dtype
) -> None:
    _judge_attention(_attend_case(n, dtype, **shape))


@pytest.mark.parametrize("D", [16, 40, 256])
@pytest.mark.parametrize("wide", [(1,), (2,), (1, 2)], ids=["keys", "values", "both"])
def test_attend_reads_what_autocast_leaves_in_float32(wide: tuple[int, ...], D: int) -> None:
    args = _attend_case(1, torch.float16, D=D)
    for i in wide:
        args[i] = args[i].float() + 1e-4  # not what half precision can hold
    cast = [x.half() if i in wide else x for i, x in enumerate(args)]
    assert torch.equal(attend_cached_blocks(*args), attend_cached_blocks(*cast))
    out = run_on_device(launch_attend, *args)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, run_on_device(launch_attend, *cast), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_new", [4, 240])
def test_append_casts_keys_to_the_dtype_of_the_windows(num_new: int) -> None:
    k = make_qkv(240, B=6, dtype=torch.float32)[1]
    start, end = (torch.tensor(x) for x in zip(*ROWS, strict=True))
    expected = [torch.full((6, 2, C, 16), 7.0, dtype=torch.float16) for C in (60, 14)]
    expected += [start, end - num_new]
    ours = [x.to(DEVICE, copy=True) for x in expected]
    rest = (None, None, num_new, 8, 4, 32, 16)
    append_windows(k.half(), *expected, *rest)
    launch_append(k.to(DEVICE), *ours, *rest)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize(("multiprocessors", "slots"), [(1, 128), (1, 2), (10_000, 128)])
def test_attend_joins_any_number_of_parts_of_any_length(
    multiprocessors: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_cached_blocks as kernels

    monkeypatch.setattr(kernels, "count_multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(kernels, "_SLOTS", slots)
    _judge_attention(_attend_case(2))


@pytest.mark.parametrize("lists", [2, 4, 32, 128, 1000])
def test_programs_of_attend_run_at_once(lists: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from infllm_flex_ops.block_attention.kernels import attend_cached_blocks as kernels

    selected = torch.empty(lists, 1, 1, 128, dtype=torch.int32, device="meta")
    for multiprocessors in (20, 132):
        monkeypatch.setattr(
            kernels, "count_multiprocessors", lambda _, count=multiprocessors: count
        )
        slots, splits = kernels._split(selected, lists)
        assert slots * splits >= 128
        assert splits == 1 or lists * splits <= (4 if slots == 1 else 3) * multiprocessors


def test_multiprocessors_are_counted_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from infllm_flex_ops.device import count_multiprocessors

    asked = []

    def answer(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(multi_processor_count=20 + device.index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", answer)
    devices = [torch.device("cuda", i) for i in (98, 99)]  # of no machine: answers are kept
    assert [count_multiprocessors(x) for x in devices * 2] == [118, 119] * 2
    assert asked == devices
    count = torch.compile(
        lambda x: x + count_multiprocessors(x.device), fullgraph=True, backend="eager"
    )
    assert count(torch.zeros(())) == 132


@pytest.mark.parametrize("block_size", [12, 40, 80])
def test_attend_with_blocks_that_are_no_power_of_two(block_size: int) -> None:
    args = _attend_case(1)
    args[3] = torch.tensor([0, 2, -1]).int().expand(6, 2, 1, -1).clone()
    args[3][2:] = -1  # too short to have a third block
    args[6] = block_size
    _judge_attention(args)


def test_any_strides() -> None:
    select, attend = _select_case(2, {}), _attend_case(2)
    expected = select_cached_blocks(*select)
    for args, count in ((select, 3), (attend, 4)):
        for i in range(count):
            args[i] = args[i].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run_on_device(launch_select_cached, *select), expected)
    _judge_attention(attend)


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
def test_touches_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    select, attend = _select_case(2, {"D": 24}), _attend_case(2, D=24)
    # Rows that fill the cache to its last slot.
    attend[5] = torch.full_like(attend[5], 240)
    attend[1].nan_to_num_()
    attend[2].nan_to_num_()
    expected = select_cached_blocks(*select), attend_cached_blocks(*attend)
    guard = [[fenced(x) if torch.is_tensor(x) else x for x in args] for args in (select, attend)]
    with fenced_allocations(monkeypatch):
        selected, out = launch_select_cached(*guard[0]), launch_attend(*guard[1])
    assert torch.equal(selected, expected[0])
    torch.testing.assert_close(out, expected[1])
