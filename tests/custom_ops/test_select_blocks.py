import pytest
import torch

from infllm_flex import reference
from infllm_flex import select_blocks as select_for
from infllm_flex_ops import compress_keys, select_blocks
from infllm_flex_ops.selection.select_in_tiles import TILE_ROWS
from tests.inputs import make_qkv, small_config
from tests.watch import WatchTensors

SHAPES = [
    pytest.param({"S": 200, "B": 2}, {}, id="aligned"),
    pytest.param({"S": 205, "Sq": 70, "Hq": 6, "D": 24}, {}, id="last_queries"),
    pytest.param({"S": 205, "Sq": 1, "Hq": 7, "Hkv": 1}, {}, id="one_query"),
    pytest.param({"S": 1, "Hq": 1, "Hkv": 1}, {}, id="one_token"),
    pytest.param({"S": 150, "Hq": 3, "Hkv": 3}, {"init_blocks": 0}, id="no_init"),
    pytest.param({"S": 150}, {"lse": "exact", "window_size": 0}, id="exact_lse"),
    pytest.param(
        {"S": 170, "Hq": 2, "Hkv": 1},
        {"kernel_size": 32, "kernel_stride": 16, "window_size": 0, "topk": 2},
        id="windows_wider_than_blocks",
    ),
    pytest.param({"S": 170}, {"kernel_size": 12, "topk": 2, "window_size": 16}, id="three_strides"),
    pytest.param({"S": 130}, {"kernel_size": 4, "topk": 5}, id="windows_apart"),
    pytest.param({"S": 100}, {"topk": 90}, id="everything_fits"),
]


@pytest.mark.parametrize(("shape", "settings"), SHAPES)
def test_selects_what_the_reference_selects(shape, settings):
    config = small_config(**settings)
    q, k, _ = make_qkv(**shape)
    expected = reference.select_blocks(q, k, config, scale=0.25)
    assert torch.equal(select_for(q, k, config, scale=0.25), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_differs_from_the_reference_only_between_near_ties(dtype):
    config = small_config()
    q, k, _ = make_qkv(205, dtype=dtype)
    selected = select_for(q, k, config, scale=0.25)
    for h in range(2):
        group = q[0, 2 * h : 2 * h + 2]
        scores = reference.score_blocks(group, k[0, h], config, scale=0.25)
        for s in range(205):
            own = s // config.block_size
            free = [b for b in range(own + 1) if not reference.is_forced(b, own, config)]
            kept_blocks = set(selected[0, h, s].tolist())
            kept = [scores[s, b].item() for b in free if b in kept_blocks]
            dropped = [scores[s, b].item() for b in free if b not in kept_blocks]
            if kept and dropped:
                assert max(dropped) <= min(kept) * (1 + 8 * torch.finfo(dtype).eps)


def test_ties_go_to_the_lower_block():
    config = small_config(window_size=0, topk=4)
    q, k, _ = make_qkv(205)
    selected = select_for(q, torch.ones_like(k), config)
    assert selected[0, 0, -1].tolist() == [0, 1, 2, 12]


def test_a_row_depends_on_nothing_but_its_past():
    config = small_config()
    q, k, _ = make_qkv(405, B=3, Hq=6)
    whole = select_for(q, k, config)
    assert torch.equal(select_for(q[1:2], k[1:2], config), whole[1:2]), "batch"
    assert torch.equal(select_for(q[:, :3], k[:, :1], config), whole[:, :1]), "heads"
    for end in (130, 257, 404):
        shorter = select_for(q[:, :, :end], k[:, :, :end], config)
        K = shorter.shape[-1]
        assert torch.equal(shorter, whole[:, :, :end, :K]), "later tokens"
        assert (whole[:, :, :end, K:] == -1).all()
        for begin in (0, 1, 100, end - 1):
            chunk = select_for(q[:, :, begin:end], k[:, :, :end], config)
            assert torch.equal(chunk, shorter[:, :, begin:]), "chunk"


def test_a_larger_budget_only_adds():
    q, k, _ = make_qkv(405)
    smaller = select_for(q, k, small_config(topk=3))
    larger = select_for(q, k, small_config(topk=5))
    masks = [reference.attention_mask(x, 16, 405) for x in (smaller, larger)]
    assert not (masks[0] & ~masks[1]).any()
    assert (masks[1] & ~masks[0]).any()


def test_forced_blocks_are_always_there_and_none_is_beyond_the_own():
    config = small_config(init_blocks=2)
    selected = select_for(*make_qkv(405)[:2], config)[0, 0].tolist()
    for s, row in enumerate(selected):
        own = s // 16
        blocks = [b for b in row if b >= 0]
        assert blocks == sorted(set(blocks))
        assert len(blocks) == min(config.num_selected, own + 1)
        assert row[len(blocks) :] == [-1] * (len(row) - len(blocks))
        assert {b for b in range(own + 1) if reference.is_forced(b, own, config)} <= set(blocks)
        assert blocks[-1] == own


def test_scaling_queries_up_and_keys_down_by_powers_of_two_changes_nothing():
    config = small_config()
    q, k, _ = make_qkv(205)
    assert torch.equal(select_for(q * 8, k / 8, config), select_for(q, k, config))


def test_the_order_of_the_heads_in_a_group_does_not_matter():
    config = small_config()
    q, k, _ = make_qkv(205, Hq=4, Hkv=2)
    swapped = q.unflatten(1, (2, 2)).flip(2).flatten(1, 2)
    assert torch.equal(select_for(swapped, k, config), select_for(q, k, config))


def test_huge_scores_still_rank():
    config = small_config(window_size=0, topk=2)
    q, k, _ = make_qkv(205)
    selected = select_for(q * 1e18, k * 1e18, config)
    assert ((selected >= 0).sum(-1) >= 1).all()
    assert (selected[0, 0, -1] == torch.tensor([0, 12])).any()


def test_nan_in_a_key_changes_no_row_before_it_and_no_other_head():
    config = small_config()
    q, k, _ = make_qkv(205)
    poisoned = k.clone()
    poisoned[0, 1, 150] = torch.nan
    clean, after = select_for(q, k, config), select_for(q, poisoned, config)
    assert torch.equal(after[:, 0], clean[:, 0])
    assert torch.equal(after[:, 1, :150], clean[:, 1, :150])
    assert ((after >= -1) & (after <= 12)).all()


def test_nan_in_a_query_changes_only_its_own_choice():
    config = small_config()
    q, k, _ = make_qkv(205)
    poisoned = q.clone()
    poisoned[0, 0, 150] = torch.nan
    clean, after = select_for(q, k, config), select_for(poisoned, k, config)
    others = torch.arange(205) != 150
    assert torch.equal(after[:, :, others], clean[:, :, others])
    assert after[0, 0, 150].tolist() == [0, 1, 7, 8, 9]


def test_strides_do_not_matter():
    config = small_config()
    q, k, _ = make_qkv(205)
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert torch.equal(select_for(*spread, config), select_for(q, k, config))


def arguments(S=100):
    q, k, _ = make_qkv(S)
    windows = (compress_keys(k, 8, 4), compress_keys(k, 32, 16))
    return (q, *windows, S, 8, 4, 32, 16, 16, 1, 2, 5, 0.25)


@pytest.mark.parametrize("S", [100, 20])
def test_is_registered_right(S):
    torch.library.opcheck(torch.ops.infllm_flex.select_blocks.default, arguments(S))


def test_is_registered_right_with_documents():
    parts = [[0, 30, 5], [0, 30, 5], [32, 33, 5], [0, 0, 0], [64, 80, 5]]
    args = (*arguments(80), torch.tensor([parts], dtype=torch.int32))
    torch.library.opcheck(torch.ops.infllm_flex.select_blocks.default, args)


@pytest.mark.parametrize(("num_parts", "num_queries"), [(3, 80), (5, 70), (0, 80)])
def test_refuses_parts_that_do_not_fit(num_parts, num_queries):
    q, *rest = arguments(80)
    documents = torch.zeros(1, num_parts, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"got {num_parts} parts and queries from position"):
        select_blocks(q[:, :, :num_queries], *rest, documents)


def test_gradients_stop():
    q, k, _ = (x.requires_grad_() for x in make_qkv(100))
    assert not select_for(q, k, small_config()).requires_grad


def test_compiles_as_one_graph():
    q, k, _ = make_qkv(205)
    config = small_config()
    compiled = torch.compile(lambda q, k: select_for(q, k, config), fullgraph=True)
    assert torch.equal(compiled(q, k), select_for(q, k, config))
    compiled = torch.compile(lambda *x: select_blocks(*x) + 0, fullgraph=True)
    assert torch.equal(compiled(*arguments()), select_blocks(*arguments()))


def test_memory_is_linear_in_the_length():
    """No tensor of the definition outgrows one tile's scores, whatever the length."""
    args = arguments(4096)
    with WatchTensors() as watch:
        select_blocks.plain(*args)
    q = args[0]
    C, rows = args[1].shape[2], TILE_ROWS
    assert 0 < watch.largest_bytes <= max(q.numel(), rows * (C + 1)) * 8
