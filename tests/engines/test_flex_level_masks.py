import pytest
import torch

from infllm_flex import reference
from infllm_flex.engines.flex import can_train
from infllm_flex.engines.flex_compiled import fold_queries, merge_attention, unfold_queries
from infllm_flex.engines.flex_level_masks import (
    Level,
    build_level_masks,
    can_split,
    can_split_backward,
    choose_levels,
)
from infllm_flex.engines.flex_options import inference_options, training_options
from tests.inputs import make_qkv, make_selected, small_config
from tests.tolerance import assert_within_rounding

BLOCK = 16


def dense_table(mask):
    """Expand a mask by its lists of blocks, for the forward: bool ``[B, H, q, kv]``."""
    num, idx, rows = mask.kv_num_blocks, mask.kv_indices, mask.BLOCK_SIZE[0]
    pairs = (
        (b, h, t, t, i) for b, h, t in num.nonzero().tolist() for i in idx[b, h, t, : num[b, h, t]]
    )
    return _mark(mask, pairs, rows)


def dense_table_by_block(mask):
    """Expand a mask by its lists of tiles, for the gradients of keys and values."""
    num, idx, rows = mask.q_num_blocks, mask.q_indices, mask.BLOCK_SIZE[0]
    pairs = (
        (b, h, n, t, n) for b, h, n in num.nonzero().tolist() for t in idx[b, h, n, : num[b, h, n]]
    )
    return _mark(mask, pairs, rows)


def _mark(mask, pairs, tile_rows):
    q_len, kv_len = mask.seq_lengths
    B, H, num_tiles = mask.kv_num_blocks.shape
    allowed = torch.zeros(num_tiles * tile_rows, kv_len + BLOCK, dtype=torch.bool)
    q, kv = torch.arange(q_len)[:, None], torch.arange(kv_len)
    allowed[:q_len, :kv_len] = mask.mask_mod(0, 0, q, kv)
    listed = torch.zeros(B, H, *allowed.shape, dtype=torch.bool)
    for b, h, _, tile, block in pairs:
        rows = slice(tile * tile_rows, (tile + 1) * tile_rows)
        keys = slice(block * BLOCK, (block + 1) * BLOCK)
        assert not listed[b, h, rows, keys].any()  # once
        listed[b, h, rows, keys] = True
    return (listed & allowed)[:, :, :q_len, :kv_len]


def by_token(table, level, num_groups):
    """One row per query head ``[B, Hkv, S * G, kv]`` of a table with padding."""
    return table.unflatten(2, (-1, level.rows))[:, :, :, :num_groups].flatten(2, 3)


@pytest.mark.parametrize(("S", "Sq"), [(256, 256), (205, 205), (205, 30), (5, 5)])
@pytest.mark.parametrize(
    ("groups", "levels"),
    [
        (16, [(8, 16), (2, 16), (1, 16)]),
        (32, [(4, 32), (1, 32)]),
        (48, [(2, 48), (1, 48)]),
        (24, [(4, 32), (1, 32)]),
        (7, [(16, 8), (4, 8), (2, 8), (1, 16)]),
        (4, [(32, 4), (8, 4), (4, 4), (1, 16)]),
    ],
)
def test_the_masks_are_disjoint_and_together_the_choice(S, Sq, groups, levels):
    assert can_split(groups)
    assert choose_levels(groups, backward=True) == levels
    selected = make_selected(S, B=2)[:, :, -Sq:]
    levels = [Level(*level) for level in levels]
    masks = build_level_masks(
        selected, small_config(), levels, kv_len=S, q_offset=S - Sq, backward=True
    )
    together = torch.zeros(2, 2, Sq * groups, S, dtype=torch.bool)
    for mask, level in zip(masks, levels, strict=True):
        assert mask.seq_lengths == (Sq * level.rows, S)
        assert mask.full_kv_num_blocks is None
        table = dense_table(mask)
        assert torch.equal(dense_table_by_block(mask), table)
        seen = by_token(table, level, groups)
        assert not (together & seen).any()
        together |= seen
        if S == 256 and level.tokens <= 8:
            assert seen.any()
    expected = reference.attention_mask(selected, BLOCK, S).repeat_interleave(groups, 2)
    assert torch.equal(together, expected)


@pytest.mark.parametrize("groups", [4, 6, 16])
def test_gradients_through_the_levels_are_those_of_masked_attention(groups):
    """The merge of several masks in plain operations, with which the kernels must agree."""
    S, Hkv = 70, 2
    config, selected = small_config(), make_selected(70)
    levels = choose_levels(groups, backward=True)
    masks = build_level_masks(selected, config, levels, kv_len=S, q_offset=0, backward=True)
    tables = [dense_table(mask) for mask in masks]
    inputs = make_qkv(S, Hq=groups * Hkv, Hkv=Hkv)
    grad_out = make_qkv(S, Hq=groups * Hkv, Hkv=Hkv, seed=1)[0]

    def in_levels(q, k, v):
        outs, lses = [], []
        for level, table in zip(levels, tables, strict=True):
            folded = fold_queries(q, Hkv, level.rows)
            scores = (folded @ k.mT * 0.25).masked_fill(~table, -torch.inf)
            empty = ~table.any(-1, keepdim=True)
            out = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ v
            lse = (
                scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
            )
            outs.append(unfold_queries(out, groups, level.rows))
            lses.append(unfold_queries(lse, groups, level.rows))
        return merge_attention(outs, lses)

    def masked(q, k, v):
        mask = reference.attention_mask(selected, BLOCK, S).repeat_interleave(groups, 1)
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return (q @ k.mT * 0.25).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    def run(attend, dtype):
        leaves = [x.clone().to(dtype).requires_grad_() for x in inputs]
        out = attend(*leaves)
        out.backward(grad_out.to(dtype))
        return [out.detach(), *(x.grad for x in leaves)]

    ours, plain = run(in_levels, torch.float32), run(masked, torch.float32)
    for actual, exact, same in zip(ours, run(masked, torch.float64), plain, strict=True):
        assert_within_rounding(actual, exact, same, factor=3)


def test_inference_pads_no_token_to_sixteen_rows():
    assert choose_levels(8) == [(16, 8), (4, 8), (2, 8), (1, 8)]
    assert choose_levels(4) == [(32, 4), (8, 4), (4, 4), (1, 4)]


def test_groups_that_leave_tensor_cores_idle_are_not_split():
    assert not any(can_split(groups) for groups in (1, 2, 3, 128))


def test_the_backward_is_refused_where_its_lists_outgrow_a_gibibyte():
    assert can_split_backward(1, 2, 65536, 1024, 16)
    assert not can_split_backward(1, 2, 131072, 2048, 16)
    assert not can_split_backward(1, 16, 4096, 64, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 48, 64, 128])
@pytest.mark.parametrize("groups", [4, 16, 48])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_fit_into_tiles_and_blocks(groups, block_size, head_dim, dtype, capability):
    config = small_config(block_size=block_size, window_size=2 * block_size)
    selected = make_selected(300, block_size=block_size)
    levels = choose_levels(groups, backward=True)
    masks = build_level_masks(selected, config, levels, kv_len=300, q_offset=0, backward=True)
    for mask, level in zip(masks, levels, strict=True):
        rows, keys = level.tokens * level.rows, block_size
        forward = inference_options(mask, head_dim, dtype, capability)
        assert rows % forward["BLOCK_M"] == 0
        assert keys % forward["BLOCK_N"] == 0
        admitted, options = training_options(mask, head_dim, dtype, capability)
        assert admitted.BLOCK_SIZE == (128, 128)
        assert admitted.q_indices is mask.q_indices
        assert (options["SPARSE_Q_BLOCK_SIZE"], options["SPARSE_KV_BLOCK_SIZE"]) == (rows, keys)
        M, N = options["fwd_BLOCK_M"], options["fwd_BLOCK_N"]
        M1, N1, M2, N2 = (options[f"bwd_BLOCK_{name}"] for name in ("M1", "N1", "M2", "N2"))
        for size in (N, M1, N1, M2, N2):
            assert size >= 16
            assert size & (size - 1) == 0
        assert all(rows % size == 0 for size in (M, M1, M2))
        assert all(keys % size == 0 for size in (N, N1, N2))
        assert N1 % M1 == 0  # required by FlexAttention
        assert M2 % N2 == 0


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


def test_a_row_without_any_key_has_zero_gradients():
    outs = [torch.zeros(3, 4, requires_grad=True) for _ in range(2)]
    lses = [torch.tensor([-torch.inf, 0.0, -torch.inf], requires_grad=True) for _ in range(2)]
    merge_attention(outs, lses).sum().backward()
    for out, lse in zip(outs, lses, strict=True):
        assert torch.equal(out.grad[0], torch.zeros(4))
        assert torch.equal(out.grad[1], torch.full((4,), 0.5))
        assert torch.equal(lse.grad, torch.zeros(3))


def test_the_cpu_trains_without_flex():
    q, k, _ = make_qkv(64, Hq=32)
    assert not can_train(q, k, small_config().block_size)
