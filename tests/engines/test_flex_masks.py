import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from infllm_flex import build_block_mask, reference
from tests.inputs import make_qkv, make_selected, small_config

CASES = [
    pytest.param(128, 128, 4, 4, id="aligned"),
    pytest.param(205, 205, 3, 7, id="ragged"),
    pytest.param(205, 30, 6, 1, id="last_queries"),
    pytest.param(100, 100, 1, 32, id="one_head"),
]


def spell_out(num, idx, num_columns):
    """Turn lists into a bool table of rows by columns."""
    listed = torch.arange(idx.shape[-1]) < num[..., None]
    columns = torch.where(listed, idx, num_columns).long()
    table = torch.zeros(*num.shape, num_columns + 1, dtype=torch.bool)
    return table.scatter_(-1, columns, True)[..., :num_columns]


@pytest.mark.parametrize(("S", "Sq", "groups", "tile_tokens"), CASES)
def test_equals_create_block_mask_of_the_same_mask(S, Sq, groups, tile_tokens):
    config = small_config()
    selected = make_selected(S)[:, :, -Sq:]
    mask = build_block_mask(
        selected, config, kv_len=S, num_groups=groups, tile_tokens=tile_tokens, backward=True
    )
    token_mask = reference.attention_mask(selected, 16, S)

    def mask_mod(b, h, q_idx, kv_idx):
        return token_mask[b, h, q_idx // groups, kv_idx]

    made = create_block_mask(
        mask_mod, 1, 2, Sq * groups, S, device="cpu", BLOCK_SIZE=mask.BLOCK_SIZE
    )
    assert mask.seq_lengths == made.seq_lengths
    num_blocks, num_tiles = -(-S // 16), mask.kv_num_blocks.shape[2]
    full = spell_out(mask.full_kv_num_blocks, mask.full_kv_indices, num_blocks)
    partial = spell_out(mask.kv_num_blocks, mask.kv_indices, num_blocks)
    made_full = spell_out(made.full_kv_num_blocks, made.full_kv_indices, num_blocks)
    made_partial = spell_out(made.kv_num_blocks, made.kv_indices, num_blocks)
    assert not (full & partial).any()
    assert torch.equal(full | partial, made_full | made_partial)
    # create_block_mask calls a ragged last tile or block partial, since padding is masked there.
    assert not (made_full & ~full).any()
    whole = slice(None, Sq // tile_tokens), slice(None, S // 16)
    assert torch.equal(full[0, :, whole[0], whole[1]], made_full[0, :, whole[0], whole[1]])

    full_q = spell_out(mask.full_q_num_blocks, mask.full_q_indices, num_tiles)
    partial_q = spell_out(mask.q_num_blocks, mask.q_indices, num_tiles)
    assert torch.equal(full_q, full.mT)
    assert torch.equal(partial_q, partial.mT)


@pytest.mark.parametrize(("S", "Sq", "groups", "tile_tokens"), CASES)
def test_mask_mod_is_exact_by_itself(S, Sq, groups, tile_tokens):
    selected = make_selected(S)[:, :, -Sq:]
    mask = build_block_mask(
        selected, small_config(), kv_len=S, num_groups=groups, tile_tokens=tile_tokens
    )
    b, h = torch.zeros((), dtype=torch.int64), torch.arange(2)[:, None, None]
    row, key = torch.arange(Sq * groups)[:, None], torch.arange(S)
    shape = (2, Sq * groups, S)
    index = [x.expand(shape) for x in (b, h, row, key)]
    expected = reference.attention_mask(selected, 16, S)[0].repeat_interleave(groups, 1)
    assert torch.equal(mask.mask_mod(*index), expected)


def test_mask_mod_finds_blocks_far_out():
    S, K = 700 * 16, 40
    random = torch.Generator().manual_seed(0)
    chosen = torch.rand(1, 1, 8, 699, generator=random).topk(K - 1).indices.sort(-1).values
    selected = torch.cat([chosen, torch.full((1, 1, 8, 1), 699)], -1).int()
    selected[0, 0, 3, 20:] = -1
    mask = build_block_mask(selected, small_config(), kv_len=S, num_groups=1)
    zero = torch.zeros((), dtype=torch.int64)
    actual = mask.mask_mod(zero, zero, torch.arange(8)[:, None], torch.arange(S))
    assert torch.equal(actual, reference.attention_mask(selected, 16, S)[0, 0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_uncompiled_flex_attention_gives_the_same_result():
    config = small_config()
    S, groups = 100, 2
    q, k, v = make_qkv(S)
    selected = make_selected(S)
    folded = q.unflatten(1, (2, groups)).transpose(2, 3).flatten(2, 3)
    mask = build_block_mask(selected, config, kv_len=S, num_groups=groups)
    out = flex_attention(folded, k, v, block_mask=mask, scale=0.25)
    out = out.unflatten(2, (S, groups)).transpose(2, 3).flatten(1, 2)
    exact = reference.masked_attention(
        q, k, v, reference.attention_mask(selected, 16, S), scale=0.25
    )
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


def test_first_moves_the_queries():
    selected = make_selected(205)[:, :, 100:130]
    config = small_config()
    ours = build_block_mask(selected, config, kv_len=205, num_groups=2, q_offset=100)
    alone = build_block_mask(selected, config, kv_len=130, num_groups=2)
    assert torch.equal(ours.kv_num_blocks, alone.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, alone.full_kv_num_blocks)


def test_no_table_of_all_pairs_is_made():
    """Storage grows with the budget, not with the length, per token."""
    config = small_config()

    def stored(S):
        mask = build_block_mask(
            make_selected(S, Hkv=1), config, kv_len=S, num_groups=4, tile_tokens=4
        )
        lists = (mask.kv_indices, mask.full_kv_indices)
        return sum(x.untyped_storage().nbytes() for x in lists) / S

    assert stored(4096) <= 1.05 * stored(1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selected": make_selected(64).long()}, "selected must be int32"),
        ({"selected": make_selected(64)[0]}, "selected must be int32 .B, Hkv, Sq, K."),
        ({"selected": make_selected(64)[:, :, :0]}, "selected must be int32 .B, Hkv, Sq, K."),
        ({"selected": make_selected(64)[..., :0]}, "selected must be int32 .B, Hkv, Sq, K."),
        ({"tile_tokens": 65}, "tile_tokens must be between 1 and 64, got 65"),
        ({"tile_tokens": 0}, "tile_tokens must be between 1 and 64, got 0"),
        ({"num_groups": 0}, "num_groups must be 1 or more, got 0"),
        ({"kv_len": 0}, "of the kv_len = 0 keys, got position -64 for 64 queries"),
        ({"kv_len": 63}, "of the kv_len = 63 keys, got position -1 for 64 queries"),
        ({"q_offset": -1}, "of the kv_len = 64 keys, got position -1 for 64 queries"),
        ({"q_offset": 64}, "of the kv_len = 64 keys, got position 64 for 64 queries"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {"selected": make_selected(64), "kv_len": 64, "num_groups": 2, "tile_tokens": 4}
    with pytest.raises(ValueError, match=message):
        build_block_mask(config=small_config(), **{**arguments, **changes})
