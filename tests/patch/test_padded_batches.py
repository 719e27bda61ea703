"""Padded batches: a row gives what it gives alone; other masks are named, or served as before."""

import pytest
import torch

import infllm_flex as ifx
from tests.patch.models import (
    FULL_ATTENTION,
    SETTINGS,
    build,
)
from tests.patch.packed import (
    HOLE,
    IDS,
    POSITIONS,
    TOTAL,
    assert_close,
    padded_batch,
)


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_padded_rows_give_what_they_give_alone(family):
    model = ifx.patch_model(build(family), SETTINGS)
    ids, mask, positions = padded_batch()
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, keep, ours in zip(ids, mask.bool(), batch, strict=True):
            if keep.any():
                assert_close(ours[keep], model(row[keep][None]).logits[0])


def test_padded_training_gives_the_sum_of_the_rows_gradients():
    model = ifx.patch_model(build(), SETTINGS).train()
    ids, mask, positions = padded_batch()
    keep = mask.bool()

    def gradients(loss):
        model.zero_grad()
        loss().backward()
        return [p.grad.clone() for p in model.parameters()]

    packed = gradients(
        lambda: model(ids, attention_mask=mask, position_ids=positions).logits[keep].square().sum()
    )
    alone = gradients(
        lambda: sum(
            model(x[k][None]).logits.square().sum() for x, k in zip(ids[:3], keep, strict=False)
        )
    )
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_no_table_of_all_pairs_is_made(monkeypatch):
    import transformers.masking_utils

    def refuse(**arguments):
        raise AssertionError("a mask was spelled out")

    model = ifx.patch_model(build(), SETTINGS)
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", refuse)
    ids, mask, positions = padded_batch()
    model(ids, attention_mask=mask, position_ids=positions)
    model(IDS, position_ids=POSITIONS, use_cache=False)


def test_padding_between_documents_is_served_where_positions_restart():
    model = ifx.patch_model(build(), SETTINGS)
    positions = torch.arange(TOTAL)[None].clone()
    positions[0, 60:] -= 60
    with torch.no_grad():
        ours = model(IDS, attention_mask=HOLE, position_ids=positions).logits
        assert_close(ours[:, :50], model(IDS[:, :50]).logits)
        assert_close(ours[:, 60:], model(IDS[:, 60:]).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_hole_in_the_mask_is_served_as_before_below_dense_len(implementation):
    model = build(attn_implementation=implementation)
    plain = model(IDS, attention_mask=HOLE).logits
    ifx.patch_model(model, SETTINGS, dense_len=1000)
    assert torch.equal(model(IDS, attention_mask=HOLE).logits, plain)


def test_a_mask_moves_and_is_cut_like_a_tensor():
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    from infllm_flex.patch.huggingface.masks import LazyMask

    _, mask, _ = padded_batch()
    arguments = {"batch_size": 4, "q_length": 160, "kv_length": 160, "attention_mask": mask.bool()}
    lazy = LazyMask({**arguments, "mask_function": causal_mask_function}, is_plain=True)
    spelled = sdpa_mask(**arguments)
    assert torch.equal(lazy[:, :, :9], spelled[:, :, :9])
    assert lazy.shape == tuple(spelled.shape)
    moved = lazy.to("meta", non_blocking=True)
    assert moved.padding.device == moved.materialize().device == torch.device("meta")
    assert lazy.to(torch.float16).padding is lazy.padding
