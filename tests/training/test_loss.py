"""The loss in chunks equals that of all logits, for heads that scale or cap them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM as Model
from transformers import (
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
)

from infllm_flex.training import loss
from infllm_flex.training.data import NO_LABEL
from infllm_flex.training.loss import LanguageLoss
from tests.tolerance import assert_within_rounding
from tests.watch import WatchTensors

SIZE = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
# Plain heads, and heads that divide, multiply or cap their logits.
CONFIGS = {
    "llama": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "granite": GraniteConfig(**SIZE, logits_scaling=16.0),
    "cohere": CohereConfig(**SIZE, logit_scale=0.25),
    "gemma": Gemma2Config(**SIZE, head_dim=16, final_logit_softcapping=3.0),
}


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_in_chunks_is_that_of_the_models_own_logits(name, monkeypatch):
    torch.manual_seed(0)
    model = Model.from_config(CONFIGS[name], attn_implementation="eager")
    tokens = torch.randint(500, (2, 30))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = NO_LABEL

    def whole(model):
        logits = model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    expected = whole(model)
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(loss, "_LOGITS_PER_MIB", 500 * 7)
    with WatchTensors() as watch:
        ours = LanguageLoss(model, logits_mib=1)(labels, input_ids=tokens, use_cache=False)
        ours.backward()
    assert watch.largest_bytes <= max(500 * 7 * 4, *(4 * p.numel() for p in model.parameters()))
    our_gradients = gradients(model)
    model.zero_grad()
    exact = whole(model.double())
    exact.backward()
    assert_within_rounding(ours.detach(), exact.detach(), expected.detach())
    assert_within_rounding(our_gradients, gradients(model), expected_gradients, factor=3.0)


def test_weights_are_factors_on_the_loss_of_each_label(monkeypatch):
    torch.manual_seed(0)
    model = Model.from_config(CONFIGS["granite"], attn_implementation="eager")
    tokens, weights = torch.randint(500, (3, 11)), torch.rand(3, 11) + 0.5
    labels = tokens.roll(-1, 1)
    labels[:, -1] = NO_LABEL

    def whole(model, weights):
        logits = model(tokens, use_cache=False).logits.flatten(0, 1)
        costs = F.cross_entropy(logits, labels.flatten(), reduction="none")
        return (costs * weights.flatten()).sum()

    expected = whole(model, weights)
    expected.backward()
    expected, expected_grads = expected.detach(), gradients(model)
    model.zero_grad()
    monkeypatch.setattr(loss, "_LOGITS_PER_MIB", 500 * 4)
    for size in (1, 100):  # in parts, and as one
        ours = LanguageLoss(model, size)(labels, weights, input_ids=tokens, use_cache=False)
        ours[0].backward()
        grads = gradients(model)
        model.zero_grad()
        exact = whole(model.double(), weights.double())
        exact.backward()
        assert_within_rounding(ours[0].detach(), exact.detach(), expected)
        assert_within_rounding(grads, gradients(model), expected_grads, factor=3.0)
        model.zero_grad()
        plain = LanguageLoss(model.float())(labels, input_ids=tokens, use_cache=False)
        assert torch.allclose(ours[1], plain)
