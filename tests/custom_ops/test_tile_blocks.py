import sys

import pytest
import torch

from infllm_flex_ops import tile_blocks, transpose_blocks
from tests.inputs import make_selected

BLOCK = 16


def unite_slowly(selected, kv_len, tile_tokens):
    """Say for each (head, tile) what is partial, full, and who is a member: plain Python."""
    Sq = selected.shape[2]
    for head in selected.flatten(0, 1).tolist():
        for begin in range(0, Sq, tile_tokens):
            tokens = [set(row) - {-1} for row in head[begin : begin + tile_tokens]]
            first = kv_len - Sq + begin
            union = sorted(set.union(*tokens))
            full = [
                b for b in union if all(b in t for t in tokens) and (b + 1) * BLOCK - 1 <= first
            ]
            partial = [b for b in union if b not in full]
            yield partial, full, [[b in t for t in tokens] for b in partial]


@pytest.mark.parametrize("tile_tokens", [1, 4, 7, 32, 33, 64])
@pytest.mark.parametrize(("S", "Sq"), [(128, 128), (205, 205), (205, 30), (5, 5)])
def test_lists_the_union_and_what_of_it_is_whole(S, Sq, tile_tokens):
    selected = make_selected(S)[:, :, -Sq:]
    width = min(-(-S // BLOCK), 5 * tile_tokens)
    lists = tile_blocks(selected, S, BLOCK, tile_tokens, width)
    kv_num, kv_idx, words, full_num, full_idx = (x.flatten(0, 2) for x in lists)
    assert words.dtype == (torch.int32 if tile_tokens <= 32 else torch.int64)
    expected = list(unite_slowly(selected, S, tile_tokens))
    assert len(kv_num) == len(expected)
    for row, (partial, full, members) in enumerate(expected):
        assert kv_idx[row, : kv_num[row]].tolist() == partial
        assert full_idx[row, : full_num[row]].tolist() == full
        for slot, member in enumerate(members):
            word = words[row, slot].item()
            assert [word >> t & 1 for t in range(tile_tokens)] == [
                *map(int, member),
                *[0] * (tile_tokens - len(member)),
            ]
        assert not kv_idx[row, kv_num[row] :].any()
        assert not full_idx[row, full_num[row] :].any()
        assert not words[row, kv_num[row] :].any()


@pytest.mark.parametrize("tile_tokens", [1, 7])
def test_lists_all_together_where_asked(tile_tokens):
    selected = make_selected(205)
    width = min(13, 5 * tile_tokens)
    num, idx, words, full_num, full_idx = tile_blocks(
        selected, 205, BLOCK, tile_tokens, width, separate_full=False
    )
    assert not full_num.any()
    assert full_idx.shape[-1] == 0
    everyone = unite_slowly(selected, 205, tile_tokens)
    for row, (partial, full, members) in enumerate(everyone):
        at = (x.flatten(0, 2)[row] for x in (num, idx, words))
        count, listed, word = (x.tolist() for x in at)
        assert listed[:count] == sorted(partial + full)
        for block, member in zip(partial, members, strict=True):
            bits = word[listed.index(block)]
            assert [bits >> t & 1 for t in range(len(member))] == [*map(int, member)]
        tokens = min(tile_tokens, 205 - row % -(-205 // tile_tokens) * tile_tokens)
        assert all(word[listed.index(block)] == (1 << tokens) - 1 for block in full)


@pytest.mark.parametrize("tile_tokens", [1, 4])
@pytest.mark.parametrize("separate_full", [True, False])
def test_blocks_that_begin_after_a_token_are_left_out(tile_tokens, separate_full):
    beyond = torch.tensor([0, 1, 2], dtype=torch.int32).expand(1, 2, 40, 3)
    own = torch.arange(40)[:, None] // BLOCK
    clean = torch.where(beyond <= own, beyond, -1)
    for x, y in zip(
        tile_blocks(beyond, 40, BLOCK, tile_tokens, 3, separate_full),
        tile_blocks(clean, 40, BLOCK, tile_tokens, 3, separate_full),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("chunk", [1, 100])
def test_chunks_of_tiles_join_seamlessly(monkeypatch, chunk):
    selected = make_selected(205)
    whole = tile_blocks(selected, 205, BLOCK, 4, 13)
    monkeypatch.setattr(
        sys.modules["infllm_flex_ops.block_lists.tile_blocks"], "_CHUNK_ENTRIES", chunk
    )
    for x, y in zip(tile_blocks(selected, 205, BLOCK, 4, 13), whole, strict=True):
        assert torch.equal(x, y)


def test_transposed_lists_name_the_same_pairs_in_order():
    kv_num, kv_idx, *_ = tile_blocks(make_selected(205, B=2), 205, BLOCK, 4, 13)
    q_num, q_idx = transpose_blocks(kv_num, kv_idx, 13)
    for b in range(2):
        for h in range(2):
            listed = [
                (block, tile)
                for tile in range(kv_num.shape[2])
                for block in kv_idx[b, h, tile, : kv_num[b, h, tile]].tolist()
            ]
            transposed = [
                (block, tile)
                for block in range(13)
                for tile in q_idx[b, h, block, : q_num[b, h, block]].tolist()
            ]
            assert transposed == sorted(listed)


@pytest.mark.parametrize("tile_tokens", [1, 4, 64])
def test_are_registered_right(tile_tokens):
    selected = make_selected(50)
    torch.library.opcheck(
        torch.ops.infllm_flex.tile_blocks.default, (selected, 50, BLOCK, tile_tokens, 4)
    )
    kv_num, kv_idx, *_ = tile_blocks(selected, 50, BLOCK, tile_tokens, 4)
    torch.library.opcheck(torch.ops.infllm_flex.transpose_blocks.default, (kv_num, kv_idx, 4))


@pytest.mark.parametrize("tile_tokens", [0, 65])
def test_tiles_of_more_tokens_than_a_word_has_bits_are_refused(tile_tokens):
    with pytest.raises(
        ValueError, match=f"tile_tokens must be between 1 and 64, got {tile_tokens}"
    ):
        tile_blocks(make_selected(50), 50, BLOCK, tile_tokens, 4)


def test_compile_as_one_graph():
    def lists(selected):
        kv_num, kv_idx, *_ = tile_blocks(selected, 50, BLOCK, 4, 4)
        return transpose_blocks(kv_num, kv_idx, 4)

    selected = make_selected(50)
    compiled = torch.compile(lists, fullgraph=True)(selected)
    for x, y in zip(compiled, lists(selected), strict=True):
        assert torch.equal(x, y)
