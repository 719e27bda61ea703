"""The Triton kernels that build lists of blocks and of tiles equal their definitions."""

import pytest
import torch
from torch import Tensor

from infllm_flex_ops.block_lists.split_shared_blocks import split_shared_blocks
from infllm_flex_ops.block_lists.tile_blocks import tile_blocks
from infllm_flex_ops.block_lists.transpose_blocks import transpose_blocks
from tests.custom_ops.harness import (
    DEVICE,
    INTERPRETED,
    far_apart,
    fenced,
    fenced_allocations,
    require_kernels,
    run_on_device,
)

require_kernels()

from infllm_flex_ops.block_lists.kernels.split_shared_blocks import launch as launch_share  # noqa: E402
from infllm_flex_ops.block_lists.kernels.tile_blocks import launch as launch_tiles  # noqa: E402
from infllm_flex_ops.block_lists.kernels.transpose_blocks import launch as launch_transpose  # noqa: E402


def _selected(
    B: int, Hkv: int, Sq: int, kv_len: int, block_size: int, K: int, seed: int = 0
) -> Tensor:
    """Select at random: the first block, two local ones and the own one always."""
    num_blocks = -(-kv_len // block_size)
    own = (torch.arange(Sq)[:, None] + kv_len - Sq) // block_size
    block = torch.arange(num_blocks)
    score = torch.rand(B, Hkv, Sq, num_blocks, generator=torch.Generator().manual_seed(seed))
    score = score.masked_fill((block < 1) | (block >= own - 2), 2).masked_fill(block > own, -1)
    best, index = score.topk(min(K, num_blocks), -1)
    index = index.masked_fill(best < 0, num_blocks).sort(-1).values
    return torch.where(index == num_blocks, -1, index).int()


def _width(selected: Tensor, kv_len: int, block_size: int, tile_tokens: int) -> int:
    return min(-(-kv_len // block_size), tile_tokens * selected.shape[-1])


def _same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    integers = {torch.int32, torch.int64}  # the latter for words of more than 32 tokens alone
    assert [x.dtype for x in actual].count(torch.int64) <= 1
    return all(
        a.dtype == e.dtype and a.dtype in integers and torch.equal(a, e)
        for a, e in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("shape", "tile_tokens"),
    [
        ((1, 2, 70, 200, 16, 6), 8),
        ((2, 1, 37, 37, 8, 5), 32),  # one ragged tile, all 32 bits of a word in use
        ((1, 1, 64, 64, 8, 5), 32),
        ((1, 2, 70, 70, 8, 5), 64),  # words of 64 bits, all in use
        ((1, 1, 50, 120, 16, 6), 40),
        ((1, 3, 50, 120, 10, 6), 7),
        ((1, 2, 20, 20, 64, 9), 1),
        ((1, 1, 1, 300, 16, 6), 8),
        ((1, 1, 1, 1, 64, 96), 16),
        ((3, 1, 9, 2000, 16, 96), 4),
    ],
)
def test_equals_the_definition(
    shape: tuple[int, int, int, int, int, int], tile_tokens: int
) -> None:
    selected, kv_len, block_size = _selected(*shape), shape[3], shape[4]
    width = _width(selected, kv_len, block_size, tile_tokens)
    expected = tile_blocks(selected, kv_len, block_size, tile_tokens, width)
    actual = run_on_device(launch_tiles, selected, kv_len, block_size, tile_tokens, width)
    assert _same(actual, expected)

    together = tile_blocks(selected, kv_len, block_size, tile_tokens, width, separate_full=False)
    args = (selected, kv_len, block_size, tile_tokens, width, False)
    assert _same(run_on_device(launch_tiles, *args), together)

    args = (selected, kv_len, block_size, tile_tokens)
    assert _same(run_on_device(launch_share, *args), split_shared_blocks(*args))

    num_blocks = -(-kv_len // block_size)
    for num, idx in (actual[:2], actual[3:], together[:2]):
        back = run_on_device(launch_transpose, num, idx, num_blocks)
        assert _same(back, transpose_blocks(num, idx, num_blocks))


@pytest.mark.parametrize("tile_tokens", [128, 100])
@pytest.mark.parametrize(("S", "Sq"), [(300, 300), (300, 140), (90, 90), (300, 1)])
def test_two_words_are_those_of_two_smaller_tiles(S: int, Sq: int, tile_tokens: int) -> None:
    selected = _selected(2, 2, Sq, S, 16, 5)
    width = _width(selected, S, 16, tile_tokens)
    args = (selected, S, 16, tile_tokens, width, False)
    num, idx, words, _, _ = run_on_device(launch_tiles, *args)
    assert words.dtype == torch.int64
    for first in range(0, Sq, tile_tokens):
        tile = first // tile_tokens
        for word, tokens in enumerate((64, tile_tokens - 64)):
            begin = first + 64 * word
            part = selected[:, :, begin : min(begin + tokens, first + tile_tokens, Sq)]
            end = S - Sq + begin + part.shape[2]
            for b, h in ((b, h) for b in range(2) for h in range(2)):
                count = num[b, h, tile]
                bits = words[b, h, tile, word * width : (word + 1) * width]
                listed = dict(zip(idx[b, h, tile, :count].tolist(), bits.tolist(), strict=False))
                assert not bits[count:].any()
                expected = {}
                if part.numel():
                    lists = tile_blocks(part, end, 16, tokens, width, separate_full=False)
                    n, blocks, members = (x[b, h, 0] for x in lists[:3])
                    pairs = zip(blocks[:n].tolist(), members.tolist(), strict=False)
                    expected = dict(pairs)
                assert {block: x for block, x in listed.items() if x} == expected
        chosen = selected[:, :, first : first + tile_tokens]
        for b, h in ((b, h) for b in range(2) for h in range(2)):
            union = sorted(set(chosen[b, h].flatten().tolist()) - {-1})
            assert idx[b, h, tile, : num[b, h, tile]].tolist() == union


def test_full_blocks_have_no_second_word() -> None:
    with pytest.raises(ValueError, match="between 1 and 64, got 65"):
        run_on_device(launch_tiles, _selected(1, 1, 70, 70, 16, 3), 70, 16, 65, 5)


@pytest.mark.parametrize("tokens", [32, 64])
def test_the_highest_bit_makes_the_word_negative(tokens: int) -> None:
    selected = torch.zeros(1, 1, tokens, 1, dtype=torch.int32)
    _, _, words, _, _ = run_on_device(launch_tiles, selected, tokens, 64, tokens, 1)
    assert words.item() == -1


def test_rows_that_selected_nothing() -> None:
    selected = torch.full((1, 1, 9, 3), -1, dtype=torch.int32)
    selected[0, 0, 8, 0] = 2
    expected = tile_blocks(selected, 600, 64, 4, 5)
    assert _same(run_on_device(launch_tiles, selected, 600, 64, 4, 5), expected)
    expected = split_shared_blocks(selected, 600, 64, 4)
    assert _same(run_on_device(launch_share, selected, 600, 64, 4), expected)


def test_takes_any_strides() -> None:
    selected = _selected(2, 3, 20, 300, 16, 6)
    expected = tile_blocks(selected, 300, 16, 8, 19)
    shuffled = selected.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert _same(run_on_device(launch_tiles, shuffled, 300, 16, 8, 19), expected)
    shared = run_on_device(launch_share, shuffled, 300, 16, 8)
    assert _same(shared, split_shared_blocks(selected, 300, 16, 8))
    num, idx = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in expected[:2])
    back = run_on_device(launch_transpose, num, idx, 19)
    assert _same(back, transpose_blocks(*expected[:2], 19))


def test_a_tile_is_the_same_in_any_company() -> None:
    selected = _selected(2, 2, 48, 300, 16, 6)
    whole = run_on_device(launch_tiles, selected, 300, 16, 8, 19)
    part = run_on_device(launch_tiles, selected[1:, 1:, 16:24], 300 - 24, 16, 8, 19)
    assert _same(part, tuple(x[1:, 1:, 2:3] for x in whole))


def test_a_list_longer_than_the_width_writes_nothing_past_it() -> None:
    selected = torch.arange(6, dtype=torch.int32).expand(1, 1, 3, 6).contiguous()
    _, _, _, full_num, full_idx = run_on_device(launch_tiles, selected, 12, 1, 1, 4)
    assert full_num.eq(4).all()
    assert full_idx.eq(torch.arange(4)).all()


def test_blocks_that_begin_after_a_token_are_left_out() -> None:
    selected = torch.tensor([0, 1, 2, 3], dtype=torch.int32).expand(1, 1, 40, 4).contiguous()
    for tile_tokens in (1, 8):
        for separate_full in (True, False):
            args = (selected, 40, 16, tile_tokens, 4, separate_full)
            assert _same(run_on_device(launch_tiles, *args), tile_blocks(*args))
        args = (selected, 40, 16, tile_tokens)
        assert _same(run_on_device(launch_share, *args), split_shared_blocks(*args))


def test_transposes_many_tiles() -> None:
    random = torch.Generator().manual_seed(0)
    num = torch.randint(0, 3, (1, 2, 2100), generator=random, dtype=torch.int32)
    idx = torch.tensor([[0, 1, 7], [0, 2, 7], [3, 4, 7]], dtype=torch.int32)
    idx = idx[torch.randint(0, 3, (1, 2, 2100), generator=random)]
    if INTERPRETED:
        num, idx = num[:, :1, :1100].contiguous(), idx[:, :1, :1100].contiguous()
    actual = run_on_device(launch_transpose, num, idx, 9)
    assert _same(actual, transpose_blocks(num, idx, 9))


def test_nothing_past_the_counts_is_read() -> None:
    selected = _selected(1, 1, 24, 200, 16, 5)
    num, idx, *_ = tile_blocks(selected, 200, 16, 8, 13)
    expected = transpose_blocks(num, idx, 13)
    past = torch.arange(13) >= num[..., None]
    poisoned = idx.masked_fill(past, 2**31 - 1)
    assert _same(run_on_device(launch_transpose, num, poisoned, 13), expected)


def test_reads_offsets_beyond_32_bits() -> None:
    selected = _selected(2, 2, 12, 200, 16, 5)
    expected = tile_blocks(selected, 200, 16, 8, 13)
    for dim in range(4):
        actual = launch_tiles(far_apart(selected, dim), 200, 16, 8, 13)
        assert _same(tuple(x.cpu() for x in actual), expected)
    num, idx = expected[:2]
    back = transpose_blocks(num, idx, 13)
    for dim in range(3):
        far = far_apart(num, dim), far_apart(idx, dim)
        assert _same(tuple(x.cpu() for x in launch_transpose(*far, 13)), back)


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
def test_touches_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, tile_tokens in (((1, 3, 13, 200, 16, 5), 4), ((2, 1, 33, 100, 16, 4), 32)):
        selected, kv_len, block_size = _selected(*shape), shape[3], shape[4]
        width = _width(selected, kv_len, block_size, tile_tokens)
        num_blocks = -(-kv_len // block_size)
        expected = tile_blocks(selected, kv_len, block_size, tile_tokens, width)
        back = transpose_blocks(*expected[:2], num_blocks)
        with fenced_allocations(monkeypatch):
            args = (fenced(selected), kv_len, block_size, tile_tokens, width)
            assert _same(launch_tiles(*args), expected)
            num, idx = fenced(expected[0]), fenced(expected[1])
            assert _same(launch_transpose(num, idx, num_blocks), back)


@pytest.mark.skipif(INTERPRETED, reason="too many programs for the interpreter")
def test_more_heads_than_a_grid_axis_holds() -> None:
    selected = torch.tensor([0, 1, -1], dtype=torch.int32).expand(70_000, 1, 2, 3)
    expected = tile_blocks(selected, 128, 64, 2, 2)
    assert _same(run_on_device(launch_tiles, selected, 128, 64, 2, 2), expected)
    num, idx = (x.to(DEVICE) for x in expected[:2])
    back = launch_transpose(num, idx, 2)
    assert _same(tuple(x.cpu() for x in back), transpose_blocks(*expected[:2], 2))
