"""The random control sees as many blocks as the variant, and the same ones in every call."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import infllm_flex as ifx
from evaluation.quality.arms import RANDOM, AttentionMode
from evaluation.quality.random_blocks import RandomBlocks, select_at_random
from infllm_flex.training.settings import StageSettings
from infllm_flex.training.stage_attention import stage_attention
from tests.evaluation.quality.tiny import make_base

CONFIG = ifx.InfLLMConfig(
    kernel_size=4,
    kernel_stride=2,
    block_size=8,
    window_size=16,
    topk=6,
    dense_len=64,
    engine="fused",
)


def inputs(S: int, Sq: int | None = None):
    random = torch.Generator().manual_seed(S)
    query = torch.randn(2, 4, S, 8, generator=random)
    key, value = (torch.randn(2, 2, S, 8, generator=random) for _ in "kv")
    return query[:, :, S - (Sq or S) :], key, value


@pytest.mark.parametrize("init", [0, 2])
def test_as_many_blocks_as_the_choice_has_forced_ones_among_them(init):
    config = ifx.InfLLMConfig(
        kernel_size=4, kernel_stride=2, block_size=8, init_blocks=init, window_size=16, topk=6
    )
    query, key, _ = inputs(333)
    ours = select_at_random(query, key, config, seed=1)
    theirs = ifx.select_blocks(query, key, config)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert torch.equal((ours >= 0).sum(-1), (theirs >= 0).sum(-1))
    own = torch.arange(333) // 8
    for position in range(333):
        seen = ours[0, 1, position][ours[0, 1, position] >= 0].tolist()
        assert seen == sorted(set(seen))
        assert set(range(min(init, int(own[position]) + 1))) <= set(seen)
        assert set(range(max(0, int(own[position]) - 2), int(own[position]) + 1)) <= set(seen)


def test_free_blocks_are_spread_evenly_and_differ_by_head_layer_and_position():
    query, key, _ = inputs(8 * 60)
    last = torch.cat(
        [select_at_random(query[:, :, -8:], key, CONFIG, seed=s)[0, 0] for s in range(400)]
    )
    counts = torch.bincount(last.flatten().long(), minlength=60)[1:57].float()
    expected = last.shape[0] * 4 / 56
    assert counts.min() > 0.75 * expected
    assert counts.max() < 1.25 * expected
    one = select_at_random(query, key, CONFIG, seed=1)[0]
    assert not torch.equal(one[0, -1], one[1, -1])
    assert not torch.equal(one[0, -1], one[0, -2])
    assert not torch.equal(one, select_at_random(query, key, CONFIG, seed=2)[0])


def test_queries_in_parts_see_what_they_see_at_once():
    query, key, value = inputs(200)
    attend = RandomBlocks(CONFIG)(layer=3)
    whole = attend(query, key, value, None)
    part = attend(query[:, :, -1:], key, value, None)
    assert torch.allclose(whole[:, :, -1:], part, atol=1e-5)
    shorter = attend(query[:, :, :50], key[:, :, :50], value[:, :, :50], None)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :50], key[:, :, :50], value[:, :, :50], is_causal=True, enable_gqa=True
    )
    assert torch.allclose(shorter, dense, atol=1e-6)  # below dense_len


def test_a_model_with_windowed_layers_trains_with_random_blocks():
    model = tiny_gemma3()
    stage = StageSettings(
        max_length=200, batch_size=1, steps=1, learning_rate=0.1, attention="sparse"
    )
    tokens = torch.randint(200, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(tokens).logits
        with stage_attention(model, stage, CONFIG, attend=RandomBlocks(CONFIG)):
            found = model(tokens).logits
        with AttentionMode(RANDOM, CONFIG).on(model):
            judged = model(tokens).logits
    assert not torch.allclose(found, dense, atol=1e-3)
    assert torch.equal(found, judged)


def tiny_gemma3():
    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=200,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
        )
    ).eval()


def test_a_model_generates_what_it_would_without_a_cache(tmp_path):
    from infllm_flex.training.model import load_model

    model = load_model(make_base(tmp_path)).eval()
    prompt = torch.randint(300, (2, 120), generator=torch.Generator().manual_seed(0))
    with AttentionMode(RANDOM, CONFIG).on(model), torch.no_grad():
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        made = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, **options)
        again = model(made[:, :-1], use_cache=False).logits[:, 119:].argmax(-1)
    # An end-of-text token would end the generation.
    end = model.config.eos_token_id
    same = (made[:, 120:] == again) | (again == end)
    assert same.all()
