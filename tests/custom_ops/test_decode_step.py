import pytest
import torch

from infllm_flex.selection import selection_rule
from infllm_flex_ops import append_windows, attend_cached_blocks, decode_step, select_cached_blocks
from tests.custom_ops.cached import make_cache
from tests.inputs import small_config

ROWS = [(0, 230), (3, 230), (150, 230), (230, 230), (0, 17)]


def arguments(num_new=1, rows=ROWS, **settings):
    """Arguments of a step whose last ``num_new`` tokens of each row are not appended yet."""
    config = small_config(dense_len=100, **settings)
    q, k, v, state = make_cache(config, rows, 240, dtype=torch.float32)
    state.end -= num_new
    coarse = None if state.coarse is state.compressed else state.coarse
    windows = state.compressed, coarse, state.start, state.end
    return [q, k, v, *windows, None, None, num_new, *selection_rule(config), 100, 7, 0.25]


def copied(args):
    return [x.clone() if torch.is_tensor(x) else x for x in args]


def by_three_operators(args):
    q, k, v, compressed, coarse, start, end = args[:7]
    append_windows(*args[1:2], *args[3:14])
    windows = compressed, compressed if coarse is None else coarse
    selected = select_cached_blocks(q, *windows, start, end, *args[10:])
    return attend_cached_blocks(q, k, v, selected, start, end, args[14], args[-1])


@pytest.mark.parametrize("num_new", [0, 1, 9])
@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_has_the_bits_of_three_operators(lse, num_new):
    args = arguments(num_new, lse=lse)
    ours = copied(args)
    assert torch.equal(decode_step(*ours), by_three_operators(args))
    for mine, theirs in zip(ours[3:7], args[3:7], strict=True):
        assert theirs is None or torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def test_bounds_become_what_is_given():
    args = arguments(rows=ROWS[:2])
    args[7:9] = torch.tensor([4]), torch.tensor([220])
    ours = copied(args)
    assert torch.equal(decode_step(*ours), by_three_operators(args))
    assert (ours[5] == 4).all()
    assert (ours[6] == 220).all()


@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_is_registered_right(lse):
    args = arguments(rows=ROWS[:2], lse=lse)
    for x in args[1:3]:
        x.nan_to_num_()
    torch.library.opcheck(torch.ops.infllm_flex.decode_step.default, args)


def test_compiles_as_one_graph():
    args = arguments(rows=ROWS[:2])
    ours = copied(args)
    compiled = torch.compile(lambda *x: decode_step(*x) + 0, fullgraph=True)
    assert torch.equal(compiled(*ours), decode_step(*args))
    for mine, theirs in zip(ours[3:7], args[3:7], strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def test_more_than_one_query_is_refused():
    args = arguments()
    args[0] = args[0].repeat(1, 1, 2, 1)
    with pytest.raises(ValueError, match="q must hold one query per row"):
        decode_step(*args)


def test_has_no_gradient():
    args = arguments(rows=ROWS[:2])
    args[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="attend without a cache"):
        decode_step(*args).sum().backward()
