import pytest
import torch

from infllm_flex_ops import split_shared_blocks
from tests.inputs import make_selected

BLOCK = 16


@pytest.mark.parametrize("tile_tokens", [1, 4, 7, 32])
@pytest.mark.parametrize(("S", "Sq"), [(128, 128), (205, 205), (205, 30), (5, 5)])
def test_every_block_goes_to_its_tile_or_stays_with_its_token(S, Sq, tile_tokens):
    selected = make_selected(S, B=2)[:, :, -Sq:]
    num, idx, rest = split_shared_blocks(selected, S, BLOCK, tile_tokens)
    assert rest.shape == selected.shape
    assert idx.shape == (2, 2, -(-Sq // tile_tokens), min(5, -(-S // BLOCK)))
    heads = zip(*(x.flatten(0, 1).tolist() for x in (selected, num, idx, rest)), strict=True)
    for chosen, counts, lists, left in heads:
        for tile, (count, listed) in enumerate(zip(counts, lists, strict=True)):
            begin = tile * tile_tokens
            tokens = [set(row) - {-1} for row in chosen[begin : begin + tile_tokens]]
            first = S - Sq + begin
            shared = sorted(
                block for block in set.intersection(*tokens) if (block + 1) * BLOCK - 1 <= first
            )
            assert listed == shared + [0] * (len(listed) - count)
            for token, row in zip(tokens, left[begin : begin + tile_tokens], strict=True):
                own = sorted(token - set(shared))
                assert row == own + [-1] * (len(row) - len(own))


def test_blocks_that_begin_after_a_token_go_nowhere():
    selected = torch.tensor([0, 1, 2, 3], dtype=torch.int32).expand(1, 1, 40, 4)
    num, idx, rest = split_shared_blocks(selected, 40, BLOCK, 8)
    assert num.tolist() == [[[0, 0, 1, 1, 2]]]
    assert idx[0, 0, 4].tolist() == [0, 1, 0]
    assert rest[0, 0, 15].tolist() == [0, -1, -1, -1]
    assert rest[0, 0, 16].tolist() == [1, -1, -1, -1]
    assert rest[0, 0, 39].tolist() == [2, -1, -1, -1]


@pytest.mark.parametrize("tile_tokens", [1, 4])
def test_is_registered_right(tile_tokens):
    args = (make_selected(50), 50, BLOCK, tile_tokens)
    torch.library.opcheck(torch.ops.infllm_flex.split_shared_blocks.default, args)
