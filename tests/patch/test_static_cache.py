"""Preallocated caches: compiled steps, resets, and models that only name the implementation."""

import copy

import pytest
import torch
from transformers import CompileConfig, StaticCache

import infllm_flex as ifx
from tests.patch.generation import GROWING, generate
from tests.patch.models import CACHE, build, tokens


@pytest.fixture
def model():
    return ifx.patch_model(build(), GROWING)


def test_a_static_cache_compiles_once_for_300_tokens(model):
    ids, mask = tokens(50), torch.ones(2, 50, dtype=torch.int64)
    mask[0, :7] = 0
    # Only the number of graphs matters here; optimising them would take ten times as long.
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    options = {"attention_mask": mask, "max_new_tokens": 300}
    expected = generate(model, ids, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = {"cache_implementation": "static", "compile_config": compiling}
    assert torch.equal(generate(model, ids, **options, **static), expected)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_a_compiled_model_allocates_a_new_caches_state_outside_of_its_graphs(model):
    # generate() does this when it prefills a static cache in chunks on a GPU.
    ids, cache = tokens(90), StaticCache(model.config, max_cache_len=120)
    cache.early_initialization(2, 2, 16, torch.float32, ids.device)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        logits = [compiled(part, **{CACHE: cache}).logits for part in ids.split(30, 1)]
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=2e-5)
    for layer in cache.layers:
        keys = layer.infllm_state.compressed_keys
        for tensor in (keys.compressed, keys.coarse, keys.start, keys.end):
            assert (
                tensor._dynamo_static_input_type == "unguarded"
            )  # marked as static, so not in a graph's memory


def test_a_static_cache_serves_again_after_a_reset(model):
    cache = StaticCache(config=model.config, max_cache_len=140)
    for length in (90, 60):
        ids = tokens(length)
        assert torch.equal(generate(model, ids, **{CACHE: cache}), generate(model, ids))
        cache.reset()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, **{CACHE: cache}), expected)
    cache.reset()  # afterwards no row counts as padded
    assert torch.equal(generate(model, ids, **{CACHE: cache}), generate(model, ids))


def test_a_model_built_for_it_generates():
    config = copy.deepcopy(build().config)
    config.sparse_config = GROWING
    model = build(config, attn_implementation="infllm_flex")
    ids = tokens(90)
    expected = generate(ifx.patch_model(build(), GROWING), ids)
    assert torch.equal(generate(model, ids), expected)


@pytest.mark.parametrize("length", [40, 90])
def test_a_model_built_for_it_is_patched_before_a_static_cache(length):
    config = copy.deepcopy(build().config)
    config.sparse_config = GROWING
    model, ids = build(config, attn_implementation="infllm_flex"), tokens(length)
    expected = generate(build(config, attn_implementation="infllm_flex"), ids)
    with pytest.raises(NotImplementedError, match=r"call infllm_flex.patch_model\(model\) first"):
        generate(model, ids, cache_implementation="static")
    ifx.patch_model(model)
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)
