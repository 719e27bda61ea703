"""On Hopper the kernels written in Gluon give the bits of those written in Triton."""

import pytest
import torch
from torch import Tensor

from infllm_flex_ops.block_lists.union_lists import list_blocks
from infllm_flex_ops.selection.rule import SelectionRule
from tests.inputs import make_qkv, make_selected

pytest.importorskip("triton")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)

BLOCK_SIZE = 64
HALF, BRAIN = torch.float16, torch.bfloat16


def _lists(selected: Tensor, S: int, tile_tokens: int) -> list[Tensor]:
    return list(list_blocks(selected, S, BLOCK_SIZE, tile_tokens))


def _attend_both_ways(
    qkv: list[Tensor], lists: list[Tensor], tile_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Attend with the kernel of specialised warps; the other kernel must give the same bits."""
    from infllm_flex_ops.block_attention.kernels import attend_blocks

    rest = (BLOCK_SIZE, tile_tokens, 0.25)
    tile_rows = qkv[0].shape[1] // qkv[1].shape[1] * tile_tokens
    assert attend_blocks.can_specialize(qkv[0], tile_rows, BLOCK_SIZE)
    specialized = attend_blocks.launch(*qkv, *lists, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(attend_blocks, "can_specialize", lambda *_: False)
        plain = attend_blocks.launch(*qkv, *lists, *rest)
    for a, b in zip(specialized, plain, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return specialized


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("shape", "tile_tokens", "dtype"),
    [
        ({"S": 1000, "Hq": 32, "Hkv": 2, "D": 128, "B": 2}, 8, BRAIN),
        ({"S": 5000, "Sq": 333, "Hq": 8, "Hkv": 2, "D": 128}, 32, BRAIN),
        ({"S": 5000, "Hq": 16, "Hkv": 1, "D": 128}, 5, BRAIN),
        ({"S": 3000, "Sq": 77, "Hq": 14, "Hkv": 2, "D": 80}, 18, HALF),
        ({"S": 2000, "Hq": 6, "Hkv": 2, "D": 64}, 42, HALF),
        ({"S": 4096, "Hq": 4, "Hkv": 2, "D": 128}, 64, BRAIN),
        ({"S": 4000, "Sq": 3333, "Hq": 4, "Hkv": 4, "D": 128}, 128, BRAIN),  # two words
        # Three warpgroups, the last one also with rows that do not exist.
        ({"S": 3000, "Hq": 6, "Hkv": 2, "D": 128}, 64, BRAIN),
        ({"S": 3000, "Sq": 333, "Hq": 8, "Hkv": 2, "D": 128, "B": 2}, 48, BRAIN),
        ({"S": 2000, "Sq": 77, "Hq": 14, "Hkv": 2, "D": 80}, 27, HALF),
        ({"S": 2000, "Hq": 16, "Hkv": 1, "D": 64}, 12, HALF),
        ({"S": 2000, "Sq": 5, "Hq": 16, "Hkv": 1, "D": 128}, 9, BRAIN),
        ({"S": 9000, "Sq": 5, "Hq": 16, "Hkv": 1, "D": 40}, 8, BRAIN),
        ({"S": 700, "Hq": 128, "Hkv": 1, "D": 128}, 1, BRAIN),
        ({"S": 40, "Hq": 16, "Hkv": 1, "D": 128}, 8, BRAIN),
        ({"S": 1, "Hq": 16, "Hkv": 1, "D": 128}, 8, BRAIN),
    ],
)
@pytest.mark.parametrize("K", [3, 40])
def test_has_the_same_bits(shape, tile_tokens, dtype, K, monkeypatch):
    qkv = [x.cuda() for x in make_qkv(**shape, dtype=dtype)]
    S = qkv[1].shape[2]
    sizes = {"B": shape.get("B", 1), "Hkv": shape["Hkv"], "block_size": BLOCK_SIZE}
    selected = make_selected(S, K=K, **sizes)[:, :, -qkv[0].shape[2] :].cuda()
    lists = _lists(selected, S, tile_tokens)
    out, _ = _attend_both_ways(qkv, lists, tile_tokens, monkeypatch)
    assert out.isfinite().all()
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    again, _ = _attend_both_ways(by_token, lists, tile_tokens, monkeypatch)
    assert torch.equal(again, out)


@pytest.mark.gpu
@on_hopper
def test_rows_and_tiles_without_a_block(monkeypatch):
    qkv = [x.cuda() for x in make_qkv(600, Hq=16, Hkv=1, D=128, dtype=BRAIN)]
    selected = make_selected(600, Hkv=1, block_size=BLOCK_SIZE).cuda()
    selected[:, :, 64:96] = -1  # whole tiles
    selected[:, :, 128:132] = -1  # the rows of one group
    selected[:, :, 3::5] = -1
    out, lse = _attend_both_ways(qkv, _lists(selected, 600, 8), 8, monkeypatch)
    empty = (selected < 0).all(-1)[0, 0]
    assert out[:, :, empty].eq(0).all()
    assert lse[:, :, empty].eq(-torch.inf).all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_inf_reach_the_same_rows(poison, monkeypatch):
    qkv = [x.cuda() for x in make_qkv(600, Hq=16, Hkv=1, D=128, dtype=BRAIN)]
    qkv[2][0, 0, 70, 3] = poison
    selected = make_selected(600, Hkv=1, block_size=BLOCK_SIZE).cuda()
    out, _ = _attend_both_ways(qkv, _lists(selected, 600, 8), 8, monkeypatch)
    touched = ~out.isfinite().all(-1).all(1)[0]
    sees = (selected == 1).any(-1)[0, 0] & (torch.arange(600, device="cuda") >= 70)
    assert torch.equal(touched, sees)


@pytest.mark.gpu
@on_hopper
def test_corrupt_lists_read_nothing_out_of_bounds():
    from infllm_flex_ops.block_attention.kernels import attend_blocks

    qkv = [x.cuda() for x in make_qkv(600, Hq=16, Hkv=1, D=128, dtype=BRAIN)]
    lists = _lists(make_selected(600, Hkv=1, block_size=BLOCK_SIZE).cuda(), 600, 8)
    lists[0].fill_(2**31 - 1)
    for wrong in (2**31 - 1, 5, -1, -(2**31)):
        lists[1].fill_(wrong)
        out, _ = attend_blocks.launch(*qkv, *lists, BLOCK_SIZE, 8, 0.25)
        assert out.isfinite().all()


WINDOWS = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "coarse_size": 128,
    "coarse_stride": 64,
    "block_size": BLOCK_SIZE,
    "init_blocks": 1,
    "local_blocks": 2,
    "num_selected": 6,
    "scale": 0.125,
}


def _score_both_ways(
    shape: tuple[int, int, int, int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = BRAIN,
    documents: Tensor | None = None,
    poison: float | None = None,
    **rule: int,
) -> None:
    """Score by the kernel for Hopper and by the other: all bits must be the same."""
    from infllm_flex_ops.selection.kernels.kernel_args import Scores
    from infllm_flex_ops.selection.kernels.prefill import launch as kernels
    from tests.custom_ops.selection_launches import launch_select

    B, Hq, Hkv, Sq, S, D = shape
    rule = WINDOWS | rule
    random = torch.Generator().manual_seed(sum(shape))
    sizes = [(B, Hq, Sq, D)]
    for size, stride in (("kernel_size", "kernel_stride"), ("coarse_size", "coarse_stride")):
        sizes.append((B, Hkv, (S - rule[size]) // rule[stride] + 1, D))
    q, keys, coarse = (torch.randn(s, generator=random).to("cuda", dtype) for s in sizes)
    if poison is not None:
        keys[0, 0, 5:9, 3] = poison
    chosen = SelectionRule(*list(rule.values())[:-1])
    assert kernels.choose_for(q, keys, chosen).method == "hopper"

    def run() -> tuple[Tensor, ...]:
        made = []

        def workspace(like: Tensor, num_scores: int, columns: int) -> Scores:
            numbers = num_scores, num_scores // 16
            made.extend(torch.full((n,), -7.0, device=like.device) for n in numbers)
            return Scores(*made, columns)

        with monkeypatch.context() as patch:
            patch.setattr(kernels, "workspace", workspace)
            out = launch_select(q, keys, coarse, S, *rule.values(), documents)
        scores, bests = made
        # Nothing depends on the best of a segment of which some blocks are not scored.
        scored = (scores.view(-1, 16) != -7.0).all(1)
        return out, scores, torch.where(scored, bests, -7.0)

    hopper = run()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "fits_hopper", lambda *_: False)
        plain = run()
    assert hopper[1].gt(0).any()
    for a, b in zip(hopper, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((2, 8, 2, 700, 9000, 128), {}),
        ((1, 7, 1, 3000, 3000, 80), {}),
        ((1, 16, 2, 500, 6001, 64), {"local_blocks": 32, "num_selected": 40}),
        ((1, 2, 2, 1000, 5000, 128), {}),
        ((1, 32, 2, 600, 5000, 128), {}),
        ((1, 12, 1, 100, 4000, 80), {}),  # a group padded to 16
        ((1, 4, 2, 40, 5000, 40), {"local_blocks": 1}),
        ((1, 4, 1, 9, 300000, 128), {}),  # cut into many runs of blocks
        ((1, 4, 1, 300, 7000, 128), {"kernel_size": 16}),  # no window reaches into the next block
        ((1, 4, 1, 300, 7000, 128), {"kernel_size": 64, "coarse_size": 256}),
        ((1, 4, 1, 300, 7000, 128), {"kernel_stride": 32, "coarse_stride": 128}),
    ],
)
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_scores_have_the_same_bits(shape, rule, dtype, monkeypatch):
    _score_both_ways(shape, monkeypatch, dtype, **rule)


@pytest.mark.gpu
@on_hopper
def test_scores_of_packed_documents_have_the_same_bits(monkeypatch):
    parts, first = [], 0
    for length in (1000, 64, 3000, 1900):
        count = -(-length // BLOCK_SIZE)
        parts += [[first, first + length, 6]] * count
        first += count * BLOCK_SIZE
    documents = torch.tensor([parts], dtype=torch.int32, device="cuda")
    for Sq in (first, 704):  # whole parts
        _score_both_ways((1, 8, 2, Sq, first, 128), monkeypatch, documents=documents)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_scores_of_nan_and_inf_have_the_same_bits(poison, monkeypatch):
    _score_both_ways((1, 8, 2, 700, 3000, 128), monkeypatch, poison=poison)


@pytest.fixture
def hopper(monkeypatch):
    from infllm_flex_ops.block_attention.kernels.attend_blocks import plan
    from infllm_flex_ops.triton_common import descriptors

    monkeypatch.setattr(plan, "compute_capability", lambda _: 90)
    monkeypatch.setattr(descriptors, "compute_capability", lambda _: 90)
    monkeypatch.setattr(plan, "knows_gluon", lambda: True)
    return plan


@pytest.mark.parametrize(
    ("groups", "kv_len", "block_size", "tokens"),
    [
        (1, 1 << 17, 64, 128),  # two words
        (2, 1 << 17, 64, 64),  # two warpgroups, as a word has no more bits
        (1, 1 << 17, 32, 64),
        (3, 1 << 17, 64, 64),  # three warpgroups share a tile
        (4, 1 << 17, 64, 48),
        (7, 1 << 17, 64, 27),
        (16, 1 << 17, 64, 12),
        (17, 1 << 17, 64, 11),
        (128, 1 << 17, 64, 1),
        (4, 1 << 17, 32, 16),  # the other kernel's rule
        (4, 1 << 15, 32, 32),
        (2, 1 << 15, 32, 32),
        (16, 1 << 17, 32, 8),
    ],
)
def test_a_tile_has_the_rows_that_suit_its_kernel(groups, kv_len, block_size, tokens, hopper):
    k = torch.empty(1, 1, kv_len, 128, dtype=BRAIN, device="meta")
    assert hopper.choose_tile_tokens(groups, k, block_size) == tokens


def test_two_warpgroups_are_enough_where_specialised_warps_do_not_attend(hopper):
    keys = torch.empty(1, 1, 1 << 17, 130, dtype=BRAIN, device="meta")[..., :128]  # not aligned
    assert hopper.choose_tile_tokens(4, keys, 64) == 32
    assert hopper.choose_tile_tokens(1, keys, 64) == 64
    for page, *tokens in ((128, 48, 128), (16, 32, 64)):  # a box lies in one page
        pages = torch.empty(9, 1, page, 128, dtype=BRAIN, device="meta")
        for groups, expected, dense in zip((4, 1), tokens, (32, 64), strict=True):
            args = (groups, pages, 64, 1 << 17)
            assert hopper.choose_tile_tokens(*args) == expected
            assert hopper.choose_tile_tokens(*args, most_groups=2) == dense


def test_a_triton_whose_gluon_is_not_known_is_named_once(monkeypatch):
    from infllm_flex_ops import device
    from infllm_flex_ops.block_attention.kernels.attend_blocks import plan

    q = torch.empty(1, 16, 8, 128, dtype=BRAIN)
    monkeypatch.setattr(plan, "compute_capability", lambda _: 90)
    device.knows_gluon.cache_clear()
    try:
        assert plan.can_specialize(q, 128, BLOCK_SIZE)
        monkeypatch.setattr("triton.__version__", "3.99.0")
        device.knows_gluon.cache_clear()
        with pytest.warns(UserWarning, match=r"Triton 3\.6, 3\.7, 3\.8; got 3\.99\.0"):
            assert not plan.can_specialize(q, 128, BLOCK_SIZE)
        assert not plan.can_specialize(q, 128, BLOCK_SIZE)
    finally:
        device.knows_gluon.cache_clear()
