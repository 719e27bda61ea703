"""Selecting by counting, against a stable sort, on scores of many distributions."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.custom_ops.harness import DEVICE, require_kernels

require_kernels()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from infllm_flex_ops.selection.kernels.kernel_args import Part, Scores  # noqa: E402
from infllm_flex_ops.selection.kernels.prefill.plan import count_segments  # noqa: E402
from infllm_flex_ops.selection.kernels.prefill.topk import (  # noqa: E402
    SEGMENT,
    topk_blocks,
    topk_kernel,
)

LARGEST, SMALLEST = torch.finfo(torch.float32).max, 2.0**-149
N = 128


@triton.jit
def _topk(
    score_ptr,
    out_ptr,
    last,
    K,
    INIT: tl.constexpr,
    LAST: tl.constexpr,
    N: tl.constexpr,
    FEW: tl.constexpr,
):
    block = tl.arange(0, N)
    score = tl.load(score_ptr + block)
    selected = topk_blocks(score, block, last, last + 1, K, INIT, LAST, FEW)
    tl.store(out_ptr + block, selected.to(tl.int32))


def _draw(kind: str, generator: torch.Generator, N: int = N) -> Tensor:
    """Scores of ``N`` blocks: at least 0, or below where there is none."""
    normal = torch.randn(N, generator=generator)
    uniform = torch.rand(N, generator=generator)
    return {
        "equal": torch.full((N,), 0.25),
        "none": torch.full((N,), -1.0),
        "two values": (uniform > 0.7).float(),
        "few values": (uniform * 5).floor() * 1e-3,
        "nearly equal": 1 + normal * 1e-6,
        "normal": 1 + normal.abs(),
        "every exponent": torch.exp2(uniform * 276 - 149).clamp(max=LARGEST),
        "one outlier": torch.where(torch.arange(N) == 40, LARGEST, uniform * SMALLEST * 8),
        "subnormal": (uniform * 9).floor() * SMALLEST,
        "pairs": normal.abs().repeat_interleave(2)[:N],  # a window that reaches into two blocks
        "with gaps": torch.where(uniform < 0.5, -1.0, normal.abs()),
    }[kind]


KINDS = ["equal", "none", "normal", "nearly equal", "subnormal", "pairs"]
KINDS += ["two values", "few values", "every exponent", "one outlier", "with gaps"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.booleans(), st.data())
def test_they_are_the_first_of_a_stable_sort(
    kind: str, few_rounds: bool, data: st.DataObject
) -> None:
    N = data.draw(st.sampled_from([128, 1024]))
    init, forced_last = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    K = data.draw(st.integers(0, 60))
    last = data.draw(st.integers(max(K, init + 1) - 1, N - 1))
    seed = data.draw(st.integers(0, 999))
    score = _draw(kind, torch.Generator().manual_seed(seed), N)

    block = torch.arange(N)
    rank = score.clamp(min=-1.0)
    rank[(block < init) | (forced_last & (block == last))] = torch.inf
    expected = torch.zeros(N, dtype=torch.bool)
    expected[rank[: last + 1].sort(descending=True, stable=True).indices[:K]] = True

    out = torch.zeros(N, dtype=torch.int32, device=DEVICE)
    _topk[(1,)](score.to(DEVICE), out, last, K, init, forced_last, N, few_rounds)
    assert torch.equal(out.cpu() != 0, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 20, 127])
@pytest.mark.parametrize("few_rounds", [False, True])
def test_few_and_nearly_all(kind: str, K: int, few_rounds: bool) -> None:
    score = _draw(kind, torch.Generator().manual_seed(K))
    out = torch.zeros(N, dtype=torch.int32, device=DEVICE)
    _topk[(1,)](score.to(DEVICE), out, N - 1, K, 0, False, N, few_rounds)
    expected = score.clamp(min=-1.0).sort(descending=True, stable=True).indices[:K].sort().values
    assert torch.equal(out.cpu().nonzero().flatten(), expected)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    init=st.sampled_from([0, 1, 18]),
    local=st.sampled_from([0, 3]),
    budget=st.integers(1, 24),
    own=st.integers(24, 255),
    seed=st.integers(0, 999),
)
# The first blocks fill the budget, and its slots hold fewer segments than the first blocks.
@example(kind="normal", init=18, local=0, budget=1, own=33, seed=819)
@example(kind="none", init=18, local=3, budget=1, own=148, seed=581)
@example(kind="pairs", init=18, local=0, budget=2, own=40, seed=0)
def test_selected_from_a_few_segments_they_are_the_same(
    kind: str, init: int, local: int, budget: int, own: int, seed: int
) -> None:
    N, K = 256, 24
    generator = torch.Generator().manual_seed(seed)
    score = _draw(kind, generator, N)
    bests = score.view(-1, SEGMENT.value).max(1).values
    bests[(own - local) // SEGMENT.value :] = torch.rand((), generator=generator)  # anything
    garbage = torch.where(torch.arange(N) < own - local, score, torch.nan)

    block = torch.arange(own + 1)
    rank = score[: own + 1].clamp(min=-1.0)
    rank[(block < init) | (block >= own - local)] = torch.inf
    expected = rank.sort(descending=True, stable=True).indices[:budget].sort().values

    # Guards on both sides, wide enough for all that a wrong selection could write.
    out = torch.full((2 * N + 1, budget), 99, dtype=torch.int32, device=DEVICE)
    topk_kernel[(1,)](
        scores=Scores(garbage.to(DEVICE), bests.to(DEVICE), N),
        out_ptr=out[N : N + 1],
        documents_ptr=out,
        head_start=0,
        row_start=0,
        row_end=1,
        q_offset=own,  # with blocks of one key, the row's position is that of its block
        Sq=1,
        K=budget,
        Hkv=1,
        num_parts=0,
        part_start=0,
        BLOCK_SIZE=1,
        INIT_BLOCKS=init,
        LOCAL_BLOCKS=local,
        PART=Part(0, 0),
        BLOCK_K=32,
        TAKEN=count_segments(K - local - 1, init),
        N=N,
    )
    assert out[N].tolist() == expected.tolist()
    assert (out[:N] == 99).all()
    assert (out[N + 1 :] == 99).all()
