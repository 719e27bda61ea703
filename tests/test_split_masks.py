import pytest
import torch

from infllm_flex import reference
from infllm_flex.engines import merge_attention
from infllm_flex.split_masks import build_split_masks, can_split
from tests.inputs import make_qkv, make_selected, small_config

BLOCK = 16


def dense_table(mask, tile_rows, q_len, kv_len):
    """Spell a mask out by its lists, as FlexAttention walks them: bool ``[B, H, q, kv]``."""
    B, H, num_tiles = mask.kv_num_blocks.shape
    table = torch.zeros(B, H, num_tiles * tile_rows, kv_len + BLOCK, dtype=torch.bool)
    q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)
    causal = torch.zeros(num_tiles * tile_rows, kv_len + BLOCK, dtype=torch.bool)
    causal[:q_len, :kv_len] = mask.mask_mod(0, 0, q, kv)
    lists = (
        (mask.kv_num_blocks, mask.kv_indices, causal),
        (mask.full_kv_num_blocks, mask.full_kv_indices, torch.ones_like(causal)),
    )
    for num, idx, allowed in lists:
        for b, h, tile in num.nonzero().tolist():
            rows = slice(tile * tile_rows, (tile + 1) * tile_rows)
            for block in idx[b, h, tile, : num[b, h, tile]].tolist():
                keys = slice(block * BLOCK, (block + 1) * BLOCK)
                assert not table[b, h, rows, keys].any()  # listed once
                table[b, h, rows, keys] = allowed[rows, keys]
    return table[:, :, :q_len, :kv_len]


@pytest.mark.parametrize(("S", "Sq"), [(256, 256), (205, 205), (205, 30), (5, 5)])
@pytest.mark.parametrize("groups", [16, 32, 48])
def test_the_two_masks_are_disjoint_and_together_the_choice(S, Sq, groups):
    assert can_split(groups)
    selected = make_selected(S, B=2)[:, :, -Sq:]
    masks = build_split_masks(selected, small_config(), kv_len=S, num_groups=groups, first=S - Sq)
    tile_rows = [mask.BLOCK_SIZE[0] for mask in masks]
    assert tile_rows[0] in (96, 128)
    assert tile_rows[1] == groups
    shared, own = (
        dense_table(mask, rows, Sq * groups, S) for mask, rows in zip(masks, tile_rows, strict=True)
    )
    assert not masks[0].kv_num_blocks.any()  # without a test
    assert not (shared & own).any()
    expected = reference.attention_mask(selected, BLOCK, S).repeat_interleave(groups, 2)
    assert torch.equal(shared | own, expected)
    if S == 256:
        assert shared.any()


def test_groups_that_leave_tensor_cores_idle_are_not_split():
    assert not any(can_split(groups) for groups in (1, 4, 7, 8, 24, 128))


def test_attention_over_disjoint_keys_is_merged_by_log_sum_exp():
    q, k, v = make_qkv(64, Hq=2)
    scores = q.double() @ k.double().mT
    first, second = torch.zeros(64, dtype=torch.bool), torch.zeros(64, dtype=torch.bool)
    first[:20], second[30:] = True, True

    def attend(keys):
        masked = scores.masked_fill(~keys, -torch.inf)
        return masked.softmax(-1).nan_to_num(0.0) @ v.double(), masked.logsumexp(-1)

    (a, la), (b, lb) = attend(first), attend(second)
    whole, _ = attend(first | second)
    torch.testing.assert_close(merge_attention([a, b], [la, lb]), whole, rtol=1e-6, atol=1e-6)
    nothing, empty = attend(torch.zeros(64, dtype=torch.bool))
    torch.testing.assert_close(merge_attention([a, nothing], [la, empty]), a)
    assert not merge_attention([nothing, nothing], [empty, empty]).any()
