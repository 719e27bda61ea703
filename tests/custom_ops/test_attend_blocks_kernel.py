"""The Triton kernels of ``attend_blocks`` and its backward are as exact as their definitions."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from infllm_flex_ops.block_attention.attend_blocks import attend_blocks
from infllm_flex_ops.block_attention.attend_blocks_backward import attend_blocks_backward
from infllm_flex_ops.block_attention.repair_nonfinite_heads import repair_nonfinite_heads
from infllm_flex_ops.block_lists.union_lists import list_blocks
from tests.custom_ops.harness import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    far_apart,
    fenced,
    fenced_allocations,
    require_kernels,
    run_on_device,
)
from tests.inputs import make_qkv, make_selected
from tests.tolerance import assert_within_rounding

require_kernels()
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy

from infllm_flex_ops.block_attention.kernels import attend_blocks as forward  # noqa: E402
from infllm_flex_ops.block_attention.kernels import attend_blocks_backward as backward  # noqa: E402
from infllm_flex_ops.block_lists.kernels.tile_blocks import launch as list_tiles  # noqa: E402


class Case(NamedTuple):
    """Inputs of one attention call, and the lists that its kernels walk."""

    qkv: list[Tensor]
    selected: Tensor
    block_size: int
    tile_tokens: int
    scale: float = 0.25

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        S = self.qkv[1].shape[2]
        return list_blocks(self.selected, S, self.block_size, self.tile_tokens)

    @property
    def rest(self) -> tuple[int, int, float]:
        """The arguments of a launch after the lists."""
        return self.block_size, self.tile_tokens, self.scale

    def define(self, qkv: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Attend by the definition."""
        return attend_blocks(
            *(qkv or self.qkv), self.selected, self.block_size, self.scale, self.tile_tokens
        )

    def define_backward(self, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate by the definition: gradient, q, k, v, output, log-sum-exp."""
        return attend_blocks_backward(
            *state, self.selected, self.block_size, self.scale, self.tile_tokens
        )


def _case(
    shape: dict[str, int], block_size: int, tile_tokens: int, dtype: torch.dtype = torch.float32
) -> Case:
    qkv = make_qkv(**shape, dtype=dtype)
    (B, _, Sq, _), (_, Hkv, S, _) = qkv[0].shape, qkv[1].shape
    selected = make_selected(S, B=B, Hkv=Hkv, block_size=block_size)[:, :, -Sq:]
    return Case(list(qkv), selected.clone(), block_size, tile_tokens)


def _judge(case: Case) -> tuple[Any, ...]:
    qkv, lists, rest = case.qkv, case.lists, case.rest
    out, lse = run_on_device(forward.launch, *qkv, *lists, *rest)
    plain_out, plain_lse = case.define()
    exact_out, exact_lse = case.define([x.double() for x in qkv])
    assert out.dtype == qkv[0].dtype
    assert lse.dtype == torch.float32
    assert_within_rounding(out, exact_out, plain_out)
    seen = exact_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert_within_rounding(lse[seen], exact_lse[seen], plain_lse[seen])

    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    state = (grad_out, *qkv, plain_out, plain_lse)
    grads = run_on_device(backward.launch, *state, *lists, *rest, case.selected)
    plain = case.define_backward(*state)
    exact_state = (grad_out.double(), *(x.double() for x in qkv), exact_out, exact_lse)
    exact = case.define_backward(*exact_state)
    for grad, exact_grad, plain_grad in zip(grads, exact, plain, strict=True):
        assert grad.dtype == out.dtype
        assert_within_rounding(grad, exact_grad, plain_grad, factor=3)
    return out, lse, grads


@pytest.mark.parametrize(
    ("shape", "block_size", "tile_tokens"),
    [
        ({"S": 96, "Hq": 4, "Hkv": 2, "D": 16}, 16, 4),
        ({"S": 101, "Hq": 6, "Hkv": 2, "D": 24, "B": 2, "Sq": 33}, 16, 7),
        ({"S": 130, "Sq": 20, "Hq": 7, "Hkv": 1, "D": 40}, 16, 32),
        ({"S": 70, "Hq": 2, "Hkv": 2, "D": 16, "Sq": 9}, 16, 1),
        ({"S": 140, "Hq": 2, "Hkv": 2, "D": 16, "Sq": 67}, 16, 64),
        ({"S": 300, "Hq": 16, "Hkv": 1, "D": 80, "Sq": 9}, 64, 8),
        ({"S": 200, "Hq": 3, "Hkv": 1, "D": 16, "Sq": 5}, 36, 3),
        ({"S": 200, "Hq": 2, "Hkv": 2, "D": 256, "Sq": 1}, 16, 16),
        ({"S": 1, "Hq": 2, "Hkv": 1, "D": 16}, 16, 4),
    ],
)
def test_is_as_exact_as_the_definition(
    shape: dict[str, int], block_size: int, tile_tokens: int
) -> None:
    _judge(_case(shape, block_size, tile_tokens))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("group", [1, 5, 16])
@pytest.mark.parametrize("D", [40, 128])
def test_is_as_exact_in_half_precision(group: int, D: int, dtype: torch.dtype) -> None:
    shape = {"S": 260, "Sq": 20, "Hq": group, "Hkv": 1, "D": D}
    _judge(_case(shape, 64, 8, dtype))


@pytest.mark.skipif(not INTERPRETED, reason="on Hopper the other tests cover it")
@pytest.mark.parametrize(
    ("shape", "block_size", "tile_tokens"),
    [
        ({"S": 260, "Sq": 37, "Hq": 16, "Hkv": 1, "D": 128}, 64, 4),
        ({"S": 260, "Sq": 37, "Hq": 8, "Hkv": 2, "D": 64, "B": 2}, 64, 32),
        ({"S": 200, "Sq": 20, "Hq": 14, "Hkv": 2, "D": 40}, 64, 8),
        ({"S": 200, "Sq": 37, "Hq": 6, "Hkv": 2, "D": 64}, 64, 32),
        ({"S": 260, "Sq": 80, "Hq": 2, "Hkv": 2, "D": 64}, 64, 64),
        ({"S": 200, "Sq": 20, "Hq": 4, "Hkv": 2, "D": 72}, 36, 8),
        ({"S": 30, "Hq": 2, "Hkv": 1, "D": 256}, 64, 16),
    ],
)
def test_tensor_descriptors_are_as_exact_as_pointers(
    shape: dict[str, int], block_size: int, tile_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infllm_flex_ops.triton_common import descriptors

    described = []
    describe = descriptors.describe
    _load_by_descriptors(monkeypatch)
    for module in (forward, backward):
        monkeypatch.setattr(module, "describe", lambda *a: described.append(a) or describe(*a))
    describe_groups = descriptors.describe_groups
    monkeypatch.setattr(
        backward, "describe_groups", lambda *a: described.append(a) or describe_groups(*a)
    )
    case = _case(shape, block_size, tile_tokens, torch.float16)
    _judge(case)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.qkv]
    _judge(case._replace(qkv=by_token))
    assert described


@pytest.mark.parametrize("tile_tokens", [128, 100])
@pytest.mark.parametrize("poison", [0.0, torch.nan], ids=["finite", "nan"])
def test_two_membership_words_attend_as_one(tile_tokens: int, poison: float) -> None:
    case = _case({"S": 300, "Sq": 190, "Hq": 2, "Hkv": 2, "D": 16, "B": 2}, 16, 64)
    case.qkv[2][1, 1, 150] = poison
    expected = run_on_device(forward.launch, *case.qkv, *case.lists, *case.rest)
    width = -(-300 // 16)
    lists = run_on_device(list_tiles, case.selected, 300, 16, tile_tokens, width, False)[:3]
    assert lists[2].shape[3] == 2 * lists[1].shape[3]
    rest = (16, tile_tokens, case.scale)
    actual = run_on_device(forward.launch, *case.qkv, *lists, *rest)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_rows_without_a_key() -> None:
    case = _case({"S": 64, "Hq": 2, "Hkv": 1, "D": 16, "Sq": 12}, 16, 4)
    case.selected[:, :, 4:8] = -1  # a whole tile
    case.selected[:, :, 1::4] = -1
    out, lse, grads = _judge(case)
    assert out[0, :, 4:8].eq(0).all()
    assert lse[0, :, 4:8].eq(-torch.inf).all()
    assert grads[0][0, :, 4:8].eq(0).all()


def test_keys_beyond_the_lists_and_the_position_have_no_effect() -> None:
    case = _case({"S": 96, "Hq": 2, "Hkv": 1, "D": 16}, 16, 4)
    (q, k, v), lists, rest = case.qkv, list(case.lists), case.rest
    expected, _ = run_on_device(forward.launch, q, k, v, *lists, *rest)
    num, idx = lists[0][..., None], lists[1]
    slot = torch.arange(idx.shape[-1])
    lists[1] = idx.masked_fill(slot >= num, 2**31 - 1)
    k[:, :, 95], v[:, :, 95] = 1e9, 1e9  # the last position alone sees it
    actual, _ = run_on_device(forward.launch, q, k, v, *lists, *rest)
    assert torch.equal(actual[:, :, :95], expected[:, :, :95])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tensor", [1, 2], ids=["key", "value"])
def test_nan_and_inf_reach_only_the_rows_that_see_them(tensor: int, poison: float) -> None:
    group = 3
    shape = {"S": 96, "Hq": 2 * group, "Hkv": 2, "D": 24, "Sq": 20}
    case = _case(shape, 16, 4)
    qkv, lists, rest = case.qkv, list(case.lists), case.rest
    clean, clean_lse = run_on_device(forward.launch, *qkv, *lists, *rest)
    poisoned = [x.clone() for x in qkv]
    poisoned[tensor][0, 0, [37, 85], 3] = poison
    out, lse = run_on_device(forward.launch, *poisoned, *lists, *rest)
    expected, expected_lse = case.define(poisoned)
    same = expected == case.define()[0]
    assert same.any()
    assert not same.all()
    torch.testing.assert_close(out[~same], expected[~same], equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[same], clean[same], rtol=1e-5, atol=1e-5)
    other = slice(group, None)  # the head without NaN keeps its bits
    assert torch.equal(out[:, other], clean[:, other])
    assert torch.equal(lse[:, other], clean_lse[:, other])


def test_heads_with_nan_are_repaired_after_another_engine() -> None:
    q, k, v = make_qkv(96, Hq=6, Sq=20, D=24)
    selected = make_selected(96)[:, :, -20:]
    v[0, 1, 80] = torch.nan
    for device in ("cpu", DEVICE):
        launch = forward.repair_nonfinite_heads if device == DEVICE else repair_nonfinite_heads
        on_device = [x.to(device) for x in (torch.full_like(q, 7.0), q, k, v, selected)]
        launch(*on_device, 16, 0.25)
        out = on_device[0].cpu()
        expected = attend_blocks(q, k, v, selected, 16, 0.25)[0]
        assert out[:, :3].eq(7.0).all()
        assert out[:, 3:].isnan().any()
        torch.testing.assert_close(out[:, 3:], expected[:, 3:], equal_nan=True)


def test_corrupt_lists_read_nothing_out_of_bounds() -> None:
    case = _case({"S": 75, "Hq": 2, "Hkv": 1, "D": 16, "Sq": 12}, 16, 4)
    qkv, lists, rest = case.qkv, list(case.lists), case.rest
    lists[0][:] = 2**31 - 1
    for wrong in (2**31 - 1, 2**27, 5, -1, -(2**31)):
        lists[1][:] = wrong
        guarded = [fenced(x) for x in (*qkv, *lists)] if INTERPRETED else [*qkv, *lists]
        out, _ = run_on_device(forward.launch, *guarded, *rest)
        assert out.isfinite().all()


@pytest.mark.parametrize("split_size", [1, 3])
def test_split_blocks_have_the_gradients_of_whole_ones(
    monkeypatch: pytest.MonkeyPatch, split_size: int
) -> None:
    case = _case({"S": 120, "Hq": 4, "Hkv": 2, "D": 24}, 16, 4)
    qkv, lists, rest = case.qkv, list(case.lists), case.rest
    out, lse = run_on_device(forward.launch, *qkv, *lists, *rest)
    state = (torch.ones_like(out), *qkv, out, lse, *lists, *rest)
    whole = run_on_device(backward.launch, *state)
    monkeypatch.setattr(backward.plan, "choose_split_size", lambda *_: split_size)
    monkeypatch.setattr(backward.splits, "_MAX_SPLITS", 40)  # not enough for all blocks
    split = run_on_device(backward.launch, *state)
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 8], ids=["one at a time", "two of three"])
def test_heads_in_turn_have_the_bits_of_all_heads_at_once(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = _case({"S": 60, "Hq": 6, "Hkv": 3, "D": 16}, 16, 4)
    qkv, lists, rest = case.qkv, case.lists, case.rest
    out, lse = run_on_device(forward.launch, *qkv, *lists, *rest)
    state = (torch.ones_like(out), *qkv, out, lse, *lists, *rest)
    at_once = run_on_device(backward.launch, *state)
    monkeypatch.setattr(backward.plan, "_FIRST_BLOCKS", blocks)  # of 4 a head
    in_turn = run_on_device(backward.launch, *state)
    for a, b in zip(in_turn, at_once, strict=True):
        assert torch.equal(a, b)


def _load_by_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels load by tensor descriptors, as on Hopper."""
    from infllm_flex_ops.triton_common import descriptors

    for module in (forward, backward.plan):
        monkeypatch.setattr(
            module, "can_use_tma", lambda *xs: all(map(descriptors.is_laid_out_for_tma, xs))
        )


def _record_plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list of the backward's plans to come."""
    plans: list[Any] = []
    make = backward.plan_backward
    monkeypatch.setattr(backward, "plan_backward", lambda *a: plans.append(make(*a)) or plans[-1])
    return plans


def _gather(monkeypatch: pytest.MonkeyPatch, range_bytes: int) -> list[Any]:
    """Let dk and dv gather tokens, as on Hopper, in small ranges; return the plans to come."""
    plans = _record_plans(monkeypatch)
    monkeypatch.setattr(backward.plan, "compute_capability", lambda _: 90)
    monkeypatch.setattr(backward.plan, "RANGE_BYTES", range_bytes)  # of 32 tokens or all
    monkeypatch.setattr(backward.plan, "_FIRST_BLOCKS", 2)
    monkeypatch.setattr(backward.plan, "_SUM_PROGRAMS", 1)
    return plans


@pytest.mark.skipif(not INTERPRETED, reason="needs descriptors; on Hopper long sequences cover it")
@pytest.mark.parametrize(
    ("shape", "tile_tokens", "first_blocks", "split_size"),
    [
        # One head more than have slots; all ranges by head, then two of the first together.
        ({"S": 330, "Sq": 300, "Hq": 48, "Hkv": 3, "D": 16}, 4, 1, 256),
        ({"S": 330, "Sq": 300, "Hq": 32, "Hkv": 2, "D": 16, "B": 2}, 4, 6, 256),
        ({"S": 330, "Sq": 300, "Hq": 48, "Hkv": 3, "D": 16}, 4, 1, 30),  # the first block is split
        ({"S": 300, "Hq": 21, "Hkv": 3, "D": 16}, 2, 1, 256),
        ({"S": 300, "Hq": 6, "Hkv": 2, "D": 16}, 4, 4, 256),  # with rows of padding
    ],
)
def test_ranges_are_as_exact_as_the_definition(
    shape: dict[str, int],
    tile_tokens: int,
    first_blocks: int,
    split_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _load_by_descriptors(monkeypatch)
    plans = _record_plans(monkeypatch)
    monkeypatch.setattr(backward.plan, "RANGE_BYTES", 1)  # 32 tiles
    monkeypatch.setattr(backward.plan, "_FIRST_BLOCKS", first_blocks)
    monkeypatch.setattr(backward.plan, "_SUM_PROGRAMS", 1)
    monkeypatch.setattr(backward.plan, "choose_split_size", lambda *_: split_size)
    _judge(_case(shape, 64, tile_tokens, torch.float16))
    (made,) = plans
    assert made.dkv.tile.IN_RANGES
    assert made.dkv.ranges.others > 0
    assert made.dkv.ranges.sum_heads == 2


@pytest.mark.skipif(not INTERPRETED, reason="on Hopper the other tests cover it")
@pytest.mark.parametrize(
    ("shape", "tile_tokens", "split_size"),
    [
        ({"S": 200, "Sq": 101, "Hq": 6, "Hkv": 2, "D": 16, "B": 2}, 16, 256),
        ({"S": 170, "Hq": 21, "Hkv": 3, "D": 16}, 8, 256),  # one head more than have slots
        ({"S": 150, "Sq": 70, "Hq": 8, "Hkv": 1, "D": 64}, 8, 256),
        ({"S": 300, "Sq": 75, "Hq": 4, "Hkv": 2, "D": 16}, 32, 256),
        ({"S": 170, "Hq": 7, "Hkv": 1, "D": 16}, 9, 70),  # the first block is split
    ],
)
@pytest.mark.parametrize("range_bytes", [1, 1 << 40], ids=["ranges", "one range"])
def test_gathered_tokens_are_as_exact_as_the_definition(
    shape: dict[str, int],
    tile_tokens: int,
    split_size: int,
    range_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = _gather(monkeypatch, range_bytes)
    monkeypatch.setattr(backward.plan, "choose_split_size", lambda *_: split_size)
    case = _case(shape, 64, tile_tokens, torch.float16)
    case.selected[:, :, 5::9, -1:] = -1  # unused slots
    _judge(case)
    (made,) = plans
    assert tile_tokens == made.dkv.tile.GATHERED
    assert (made.dkv.ranges.others > 0) == (range_bytes == 1)


@pytest.mark.skipif(not INTERPRETED, reason="on Hopper the other tests cover it")
def test_gathered_tokens_stay_in_their_document(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = _gather(monkeypatch, 1)
    case = _case({"S": 250, "Hq": 6, "Hkv": 2, "D": 16}, 64, 16, torch.float16)
    later = torch.arange(250)[:, None] >= 128  # the second document
    left_out = (case.selected < 0) | (later & (case.selected < 2))
    chosen = case.selected.masked_fill(left_out, 4).sort(-1).values
    grads = _judge(case._replace(selected=chosen.masked_fill(chosen == 4, -1)))[2]
    assert plans[0].dkv.tile.GATHERED
    assert grads[1].isfinite().all()


def test_blocks_after_a_token_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case({"S": 200, "Hq": 6, "Hkv": 2, "D": 16}, 64, 16, torch.float16)
    own = torch.arange(200)[:, None] // 64
    everything = torch.arange(4, dtype=torch.int32).expand(1, 2, 200, 4).contiguous()
    case = case._replace(selected=everything.masked_fill(everything > own, -1))
    out, lse = run_on_device(forward.launch, *case.qkv, *case.lists, *case.rest)
    _gather(monkeypatch, 1)
    state = (torch.ones_like(out), *case.qkv, out, lse, *case.lists, *case.rest)
    expected = run_on_device(backward.launch, *state, case.selected)
    actual = run_on_device(backward.launch, *state, everything)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_large_logits_do_not_overflow() -> None:
    case = _case({"S": 96, "Hq": 2, "Hkv": 1, "D": 16, "Sq": 20}, 16, 4)
    (q, k, v), lists, rest = case.qkv, case.lists, case.rest
    out, lse = run_on_device(forward.launch, q * 1e4, k, v, *lists, *rest)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_takes_any_strides() -> None:
    case = _case({"S": 80, "Hq": 4, "Hkv": 2, "D": 16, "B": 2, "Sq": 20}, 16, 4)
    qkv, lists, rest = case.qkv, list(case.lists), case.rest
    out, lse = run_on_device(forward.launch, *qkv, *lists, *rest)
    grad_out = torch.ones_like(out)
    grads = run_on_device(backward.launch, grad_out, *qkv, out, lse, *lists, *rest)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    strided = [torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in strided]
    assert torch.equal(run_on_device(forward.launch, *strided, *lists, *rest)[0], out)
    expanded = torch.ones(()).expand(out.shape)
    again = run_on_device(backward.launch, expanded, *strided, out, lse, *lists, *rest)
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


def test_reads_offsets_beyond_32_bits() -> None:
    shape = {"S": 40, "Hq": 2, "Hkv": 2, "D": 16, "Sq": 6}
    case = _case(shape, 16, 4, torch.float16)
    qkv, lists, rest = case.qkv, list(case.lists), case.rest
    out, lse = run_on_device(forward.launch, *qkv, *lists, *rest)
    grads = run_on_device(backward.launch, out, *qkv, out, lse, *lists, *rest)
    device = "cpu" if INTERPRETED else "cuda"
    near = [x.to(device) for x in (*qkv, *lists)]
    for tensor in range(3):
        for dim in (1, 2):
            far = list(near)
            far[tensor] = far_apart(qkv[tensor], dim)
            assert torch.equal(forward.launch(*far, *rest)[0].cpu(), out)
            state = [out.to(device), *far[:3], out.to(device), lse.to(device)]
            again = backward.launch(*state, *far[3:], *rest)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(again, grads, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
def test_touches_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case({"S": 75, "Hq": 6, "Hkv": 2, "D": 24, "Sq": 10}, 16, 4)
    qkv, lists, rest = case.qkv, list(case.lists), case.rest
    out, lse = forward.launch(*qkv, *lists, *rest)
    grads = backward.launch(out, *qkv, out, lse, *lists, *rest)
    qkv, lists = [fenced(x) for x in qkv], [fenced(x) for x in lists]
    with fenced_allocations(monkeypatch):
        again, lse_again = forward.launch(*qkv, *lists, *rest)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)
        state = [fenced(x) for x in (out, out, lse)]
        grads_again = backward.launch(state[0], *qkv, *state[1:], *lists, *rest)
        assert all(torch.equal(a, b) for a, b in zip(grads_again, grads, strict=True))
