"""A decode step of a patched model does little more in Python than that of an unpatched one."""

import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

import infllm_flex as ifx
from infllm_flex.patch.override import observe_attention
from tests.patch.generation import GROWING
from tests.patch.models import CACHE, CONFIGS, build, tokens

# An unpatched layer makes some 100 calls. A hook of a layer's own would take as long as all of
# these, which it does not show in calls.
MORE_PER_LAYER, MORE_PER_FORWARD = 9, 60


def deep(layers):
    config = CONFIGS["llama"]()
    config.num_hidden_layers = layers
    return build(config)


def calls_of_step(model, cache):
    """Number of Python functions that a step over 30 cached tokens calls."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    with torch.no_grad():
        model(tokens(30), **{CACHE: cache})
        model(tokens(1), **{CACHE: cache})  # whatever happens at a first step only
        sys.setprofile(count)
        try:
            model(tokens(1), **{CACHE: cache})
        finally:
            sys.setprofile(None)
    return calls


CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(model.config, max_cache_len=40),
}


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_a_short_step_adds_few_calls(make_cache):
    more = {}
    for layers in (4, 8):
        plain, patched = deep(layers), ifx.patch_model(deep(layers), GROWING)
        counts = [calls_of_step(model, make_cache(model)) for model in (plain, patched)]
        more[layers] = counts[1] - counts[0]
    per_layer = (more[8] - more[4]) / 4
    assert per_layer <= MORE_PER_LAYER
    assert more[8] - 8 * per_layer <= MORE_PER_FORWARD


def test_layers_of_a_model_have_no_hook():
    model = ifx.patch_model(build(), GROWING)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_short_steps_are_observed():
    model, seen = ifx.patch_model(build(), GROWING), []

    def observe(out, query, key, scale):
        seen.append(query.shape[2])
        return out

    with torch.no_grad():
        cache = DynamicCache()
        model(tokens(9), **{CACHE: cache})
        with observe_attention(model, lambda _: observe):
            model(tokens(1), **{CACHE: cache})
    assert seen == [1, 1]


def test_layers_called_without_their_model_find_the_cache():
    """Here the layers are called by hand, so no forward of a model knows the cache."""
    model, ids = ifx.patch_model(build(), GROWING), tokens(70)

    def run(part, cache, begin):
        hidden = model.model.embed_tokens(part)
        positions = torch.arange(begin, begin + part.shape[1])[None]
        rotary = model.model.rotary_emb(hidden, positions)
        for layer in model.model.layers:
            out = layer(hidden, position_embeddings=rotary, **{CACHE: cache})
            hidden = out if isinstance(out, torch.Tensor) else out[0]
        return model.lm_head(model.model.norm(hidden))

    with torch.no_grad():
        cache = DynamicCache()
        steps = [run(ids[:, :60], cache, 0)]
        steps += [run(ids[:, i : i + 1], cache, i) for i in range(60, 70)]
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-3, atol=5e-5)
    assert all(layer.infllm_state is not None for layer in cache.layers)
