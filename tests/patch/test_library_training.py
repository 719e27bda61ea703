"""Training needs of patched models: autocast, and libraries' own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import infllm_flex as ifx
from infllm_flex import attention
from infllm_flex.patch import attend_through
from tests.patch.models import LONG, SETTINGS, SHORT, build, gemma2, logits, tokens


def test_autocast_serves_sparse_and_dense_lengths():
    model = ifx.patch_model(build(), SETTINGS)
    for length in (SHORT, LONG):
        batch = tokens(length)
        exact = model(batch, labels=batch, use_cache=False).loss
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(batch, labels=batch, use_cache=False).loss
        rounded.backward()
        assert 0 < (exact - rounded).abs() < 0.05
        assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_autocast_leaves_the_choice_of_blocks_in_float32(monkeypatch):
    """Queries and keys are rounded; scores of the rounded ones are float32."""
    model, chosen = ifx.patch_model(build(), SETTINGS), []
    real = attention.select_blocks_unchecked

    def choose(query, key, *others):
        assert query.dtype == key.dtype == torch.bfloat16
        chosen.append((real(query, key, *others), query.clone(), key.clone(), *others))
        return chosen[-1][0]

    monkeypatch.setattr(attention, "select_blocks_unchecked", choose)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, LONG)
    assert len(chosen) == 2
    for selected, *inputs in chosen:
        assert torch.equal(real(*inputs), selected)


def attend_densely(calls):
    """Attend to everything, and note the layers that are handed over."""

    def attend_in(layer):
        def attend(query, key, value, scale):
            calls.append(layer)
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )

        return attend

    return attend_in


def test_attention_can_be_handed_over_for_a_block():
    model = ifx.patch_model(build(), SETTINGS)
    calls = []
    with ifx.dense(model):
        dense = logits(model, LONG)
    sparse = logits(model, LONG)
    with attend_through(model, attend_densely(calls)):
        assert torch.equal(logits(model, LONG), dense)
    assert calls == [0, 1]
    assert torch.equal(logits(model, LONG), sparse)


def test_a_model_that_cannot_hand_over_every_layer_says_so():
    with (
        pytest.raises(ValueError, match="is not patched"),
        attend_through(build(), lambda layer: lambda *_: None),
    ):
        pass
    model = ifx.patch_model(build(gemma2(), attn_implementation="eager"), SETTINGS)
    with (
        pytest.raises(ValueError, match=r"layers\.0.* cannot be replaced: sliding"),
        attend_through(model, lambda layer: lambda *_: None),
    ):
        pass


def test_layers_that_cannot_be_handed_over_may_stay():
    model = ifx.patch_model(build(gemma2(), attn_implementation="eager"), SETTINGS)
    with ifx.dense(model):
        dense = logits(model, LONG)
    sparse, calls = logits(model, LONG), []
    with attend_through(model, attend_densely(calls), leave_others=True):
        torch.testing.assert_close(logits(model, LONG), dense)
    assert calls == [1]
    assert torch.equal(logits(model, LONG), sparse)
