"""FLOPs and memory are counted layer by layer, since layers may differ."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from infllm_flex.training.attention_shapes import attention_shapes
from infllm_flex.training.flops import FlopCounter
from infllm_flex.training.memory_estimate import estimate_memory
from tests.training.runs import ATTENTION, settings, stage

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "pad_token_id": 0,
}
KINDS = ["sliding_attention"] * 3 + ["full_attention"]
GEMMA4 = Gemma4TextConfig(
    **SIZES,
    head_dim=16,
    global_head_dim=32,
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    sliding_window=32,
    layer_types=KINDS,
    hidden_size_per_layer_input=0,
    num_kv_shared_layers=0,
)


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (LlamaConfig(**SIZES), [(4, 2, 16, None)] * 4),
        (MistralConfig(**SIZES, sliding_window=32), [(4, 2, 16, 32)] * 4),
        (
            Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=32, layer_types=KINDS),
            [(4, 2, 16, 32)] * 3 + [(4, 2, 16, None)],
        ),
        (GEMMA4, [(4, 2, 16, 32)] * 3 + [(4, 1, 32, None)]),
        (Qwen3NextConfig(**SIZES, head_dim=16), [(4, 2, 16, None)]),  # three are linear
    ],
    ids=lambda x: type(x).__name__,
)
def test_each_layer_has_its_own_heads_and_window(config, shapes):
    assert list(attention_shapes(config)) == shapes


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_layers_with_a_window_cost_what_they_see(attention):
    model = AutoModelForCausalLM.from_config(GEMMA4)
    work = FlopCounter(model, stage(attention=attention, max_length=256), ATTENTION)
    counted = work.flops([256]) - 256 * work._per_token
    budget = ATTENTION.budget_tokens if attention == "sparse" else 256

    def pairs(most):
        return most * most / 2 + (256 - most) * most

    scored = 256 * 256 / 2 * (1 / 2 + 1 / 8) if attention == "sparse" else 0
    windowed = 3 * 4 * 16 * 6 * pairs(32)
    assert counted == 2 * (windowed + 4 * 32 * (6 * pairs(budget) + scored))


def test_memory_is_estimated_where_layers_differ(tmp_path):
    stages = {"long": stage(attention="sparse", max_length=4096)}
    run = settings(tmp_path, tmp_path, stages=stages)

    def activations(config):
        model = AutoModelForCausalLM.from_config(config)
        return estimate_memory(model, run, 1, torch.device("cpu")).activations

    plain = activations(Gemma3TextConfig(**SIZES, head_dim=16, layer_types=KINDS))
    assert plain < activations(GEMMA4) < 1.2 * plain  # one layer of four has wider heads
