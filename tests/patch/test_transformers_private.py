"""Each private API of transformers still does what `transformers_private` says of it.

``scripts/test_private_apis`` runs these tests with other versions of transformers.
"""

import inspect
import re

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.bart import modeling_bart
from transformers.models.llama import modeling_llama
from transformers.models.mllama import modeling_mllama

from infllm_flex.patch.huggingface import transformers_private as private
from infllm_flex.patch.huggingface.config_view import ConfigView
from tests.patch.models import CACHE, build, tokens

pytestmark = pytest.mark.private_api
FUNCTIONS = [
    function
    for name, function in vars(private).items()
    if inspect.isfunction(function) and function.__module__ == private.__name__
]
ATTENTION = inspect.unwrap(modeling_llama.LlamaAttention.forward)
S = 12
NEW_PAGES = version.parse(transformers.__version__) >= version.parse("5.20")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_entry_says_what_it_needs_and_has_a_test(function):
    text = inspect.getdoc(function)
    for part in ("\nAPI: ", r", seen\s+in\s+5\.\d", "\nIf it goes: ", "\nInstead: "):
        assert re.search(part, text), part
    assert f"test_{function.__name__}" in globals()


# Which modules attend, and by which function.


def test_reads_attention_registry():
    assert private.reads_attention_registry(ATTENTION)
    assert not private.reads_attention_registry(modeling_llama.LlamaMLP.forward)
    assert not private.reads_attention_registry(modeling_llama.LlamaModel.forward)


def test_attention_functions():
    found = private.attention_functions(ATTENTION, ("sdpa", "eager"))
    assert found["eager"] is modeling_llama.eager_attention_forward
    assert found["sdpa"] is not found["eager"]
    attention = build().model.layers[0].self_attn
    q, k = torch.randn(1, 4, S, 16), torch.randn(1, 2, S, 16)
    mask = torch.zeros(1, 1, S, S)
    outs = [f(attention, q, k, k, mask, dropout=0.0, scaling=0.3)[0] for f in found.values()]
    assert outs[0].shape == (1, S, 4, 16)
    torch.testing.assert_close(*outs)


def test_passes_keyword():
    assert private.passes_keyword(ATTENTION, "dropout")
    assert not private.passes_keyword(ATTENTION, "position_bias")


def test_makes_masks():
    assert private.makes_masks([inspect.unwrap(modeling_llama.LlamaModel.forward)])
    assert not private.makes_masks([ATTENTION, None])


def test_takes_other_states():
    for cls in (modeling_mllama.MllamaTextCrossAttention, modeling_bart.BartAttention):
        assert private.takes_other_states(inspect.signature(cls.forward).parameters)
    assert not private.takes_other_states(inspect.signature(ATTENTION).parameters)


def test_is_model():
    model = build()
    assert private.is_model(model)
    assert private.is_model(model.model)
    assert not private.is_model(model.model.layers[0])


# The name of the attention function in a config.


def test_implementation_attribute():
    config = LlamaConfig(attn_implementation="eager")
    assert vars(config)[private.implementation_attribute()] == "eager"


def test_has_implementation():
    assert private.has_implementation(LlamaConfig())
    assert not private.has_implementation(None)


def test_get_implementation():
    assert private.get_implementation(build(attn_implementation="eager").config) == "eager"
    assert private.get_implementation(object()) is None


def test_set_own_implementation():
    config = AutoConfig.for_model("llava")
    config.text_config._attn_implementation = "eager"
    private.set_own_implementation(config, "sdpa")
    assert private.get_implementation(config) == "sdpa"
    assert private.get_implementation(config.text_config) == "eager"


def test_override_implementation():
    class Renamed(LlamaConfig):
        _infllm_class = LlamaConfig
        own = "our"

    private.override_implementation(Renamed, "own", lambda own, stored: f"{own} {stored}")
    config = Renamed()
    config._attn_implementation = "eager"
    assert private.get_implementation(config) == "our eager"
    assert private.implementation_attribute() in vars(config)
    assert isinstance(ConfigView._attn_implementation, property)


def test_sub_configs():
    config = AutoConfig.for_model("llava")
    assert private.sub_configs(config)["text_config"] is config.text_config
    assert private.sub_configs(LlamaConfig()) == {}


# Masks. Transformers itself calls the registered mask function with the arguments that count.


def mask_arguments(model, *args, **kwargs):
    """The arguments of the first mask that a forward asks for."""
    seen = []

    def record(**arguments):
        seen.append(arguments)
        return private.make_sdpa_mask(arguments)

    sdpa = private.attention_functions(ATTENTION, ("sdpa",))["sdpa"]
    AttentionInterface.register("recorded", sdpa)
    AttentionMaskInterface.register("recorded", record)
    model.set_attn_implementation("recorded")
    with torch.no_grad():
        model(*args, **kwargs)
    return seen[0]


PADDING = torch.ones(2, S, dtype=torch.long)
PADDING[1, :3] = 0


def causal_table():
    return torch.ones(S, S).tril().bool()[None, None] & PADDING.bool()[:, None, None]


def test_make_sdpa_mask():
    padded = mask_arguments(build(), tokens(S), attention_mask=PADDING)
    made = private.make_sdpa_mask(padded)
    real = PADDING.bool()[:, None, :, None]
    assert torch.equal(made & real, causal_table() & real)
    plain = mask_arguments(build(), tokens(S))
    assert private.make_sdpa_mask(plain) is None
    table = private.make_sdpa_mask(plain, skip_causal=False)
    assert torch.equal(table[0, 0], torch.ones(S, S).tril().bool())


def test_is_plain_mask():
    arguments = mask_arguments(build(), tokens(S), attention_mask=PADDING)
    assert private.is_plain_mask(arguments)
    packed = (torch.arange(S) % 5)[None]
    arguments = mask_arguments(build(), tokens(S, 1), position_ids=packed, use_cache=False)
    assert not private.is_plain_mask(arguments)


def test_is_mask_of_new_keys():
    arguments = mask_arguments(build(), tokens(S), attention_mask=PADDING)
    assert private.is_mask_of_new_keys(arguments)
    model = build()
    cache = DynamicCache(config=model.config)
    model(tokens(S), **{CACHE: cache})
    step = mask_arguments(model, tokens(3), attention_mask=torch.ones(2, S + 3), **{CACHE: cache})
    assert not private.is_mask_of_new_keys(step)


def test_without_long_window():
    config = AutoConfig.for_model(
        "mistral", hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    for window, is_dropped in ((S + 20, True), (S - 4, False)):
        config.sliding_window = window
        arguments = mask_arguments(build(config), tokens(S), attention_mask=PADDING)
        assert arguments["local_size"] == window
        found = private.without_long_window(arguments)
        assert (found["local_size"] is None) == is_dropped
        assert private.is_plain_mask(found) == is_dropped


def test_plain_mask_arguments():
    arguments = private.plain_mask_arguments(2, S, PADDING.bool())
    real = PADDING.bool()[:, None, :, None]
    assert torch.equal(private.make_sdpa_mask(arguments) & real, causal_table() & real)
    assert private.is_plain_mask(arguments)
    assert private.is_mask_of_new_keys(arguments)


def test_sees():
    packed = (torch.arange(S) % 5)[None]
    arguments = mask_arguments(build(), tokens(S, 1), position_ids=packed, use_cache=False)
    row = torch.zeros(1, 1, dtype=torch.long)
    query, key = torch.tensor([[4, 6, 6, 11]]), torch.tensor([[0, 4, 5, 10]])
    assert private.sees(arguments, row, query, key).tolist() == [[True, False, True, True]]


# Caches.


def test_takes_cache():
    assert private.takes_cache(inspect.signature(modeling_llama.LlamaModel.forward).parameters)
    assert not private.takes_cache(("hidden_states", "attention_mask", "kwargs"))


def test_find_cache():
    model, seen = build(), []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(private.find_cache(kwargs)), with_kwargs=True
    )
    cache = DynamicCache(config=model.config)
    model(tokens(S), **{CACHE: cache})
    model(tokens(S), use_cache=False)
    assert seen == [cache, None]


def test_cache_layers():
    model = build()
    cache = DynamicCache(config=model.config)
    model(tokens(S), **{CACHE: cache})
    assert private.cache_layers(cache) is cache.layers
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (2, 2, S, 16)
    pair = EncoderDecoderCache(cache, DynamicCache())
    assert private.cache_layers(pair) is cache.layers
    assert private.cache_layers(None) is None


def test_is_offloading():
    assert not private.is_offloading(DynamicCache())
    assert "offloading" in inspect.signature(Cache.__init__).parameters
    assert "self.offloading" in inspect.getsource(Cache)


def test_is_static():
    model = build()
    cache = StaticCache(config=model.config, max_cache_len=2 * S)
    model(tokens(S), **{CACHE: cache})
    assert all(private.is_static(layer) for layer in cache.layers)
    assert int(cache.layers[0].cumulative_length) == S
    assert not private.is_static(DynamicLayer())
    assert not private.is_static(None)


def test_growing_layer_class():
    kind = private.growing_layer_class()
    layer, new = kind(), torch.randn(2, 1, 5, 4)
    layer.update(new, new + 1)
    keys, values = layer.update(new, new + 1)
    assert layer.keys is keys
    assert layer.values is values
    assert torch.equal(keys, torch.cat([new, new], 2))
    layer.crop(-3)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, keys[[1, 1], :, :7])
    layer.offload()
    layer.prefetch()
    layer.reset()
    assert layer.keys is None or not layer.keys.any()


def test_hybrid_layer_class():
    kind = private.hybrid_layer_class()
    assert kind is None or issubclass(kind, DynamicLayer)


def batched(model, seen):
    """Run continuous batching over prompts of 5 and 9 tokens, and call ``seen`` by each layer."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen(kwargs), with_kwargs=True
        )
    settings = {"num_blocks": 8, "max_batch_tokens": 32}
    settings["page_size" if NEW_PAGES else "block_size"] = 16
    found = model.generate_batch(
        [list(range(3, 8)), list(range(3, 12))],
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=2, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
        progress_bar=False,
    )
    assert all(request.error is None for request in found.values())


def test_is_paged():
    found = []
    batched(build(), lambda kwargs: found.append(private.find_cache(kwargs)))
    assert len(found) == 2 * 2
    assert all(private.is_paged(cache) for cache in found)
    assert not private.is_paged(DynamicCache())
    assert not private.is_paged(None)


needs_new_pages = pytest.mark.skipif(
    not NEW_PAGES, reason="continuous batching sets names with paged| before 5.20"
)


@needs_new_pages
def test_update_pages():
    """By `test_paged_step`, which counts what it returns."""
    key = torch.randn(1, 2, 3, 4)
    kwargs = {"other": 1}
    assert private.update_pages(None, key, key + 1, kwargs)[0] is key
    assert kwargs == {"other": 1}


@needs_new_pages
def test_paged_step():
    model, steps = build(), []

    def recorded(module, query, key, value, mask, scaling=None, **kwargs):
        key, value = private.update_pages(module, key, value, kwargs)
        step = private.paged_step(kwargs)
        bounds = step.query_bounds.tolist(), step.key_bounds.tolist()  # of buffers that change
        steps.append((query.shape[2], key.shape[2], mask.shape, step.longest, *bounds))
        return sdpa(module, query, key, value, mask, scaling=scaling, **kwargs)

    sdpa = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS, "sdpa", recorded)
        batched(model, lambda kwargs: None)
    prompts, *_, last = steps
    assert prompts[:4] == (14, 14, (1, 1, 14, 14), 9)
    assert last[:4] == (2, 16, (1, 1, 2, 16), 10)
    assert prompts[4] == prompts[5]
    assert last[4] == [0, 1, 2]
    # The order of the requests is that of the server.
    assert prompts[5] in ([0, 5, 14], [0, 9, 14])
    assert last[5] in ([0, 6, 16], [0, 10, 16])
