"""Caches that quantise keys, store them in other slots, or keep them on another device."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

import infllm_flex as ifx
from tests.patch.generation import GROWING
from tests.patch.models import CACHE, build, tokens

NO_KERNELS = pytest.mark.skipif(
    "torch.get_default_device().type == 'cuda'", reason="in float64, which a GPU does not attend in"
)
EVERYTHING = {**GROWING, "topk": 16}
STEPS = 40

# Requantised every 16 tokens, so that keys of the past change more than once.
GROUPS = {"residual_length": 16, "nbits": 4, "q_group_size": 16}
BACKENDS = {
    "hqq": {"backend": "hqq", "axis_key": 1, "axis_value": 1, **GROUPS},
    "quanto": {"backend": "quanto", "axis_key": 0, "axis_value": 0, **GROUPS},
    "fp8": {"backend": "fp8"},
}


@pytest.fixture(params=BACKENDS)
def quantised(request):
    """The ``cache_config`` of ``generate``."""
    backend = request.param
    if backend == "hqq" and not is_hqq_available():
        pytest.skip("needs hqq")
    if backend == "quanto" and not is_optimum_quanto_available():
        pytest.skip("needs optimum-quanto")
    try:
        QuantizedCache(config=build().config, **BACKENDS[backend])
    except ValueError as error:
        pytest.skip(str(error))  # a version of transformers without it
    return BACKENDS[backend]


def generate(model, ids, cache_config, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=STEPS,
        cache_implementation="quantized",
        cache_config=cache_config,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_with_every_block_selected_a_quantised_cache_gives_what_a_dense_model_gives(
    quantised, options
):
    ids = tokens(90)
    expected = generate(build(), ids, quantised, **options)
    assert torch.equal(
        generate(ifx.patch_model(build(), EVERYTHING), ids, quantised, **options), expected
    )


def test_steps_over_a_quantised_cache_are_the_full_operator_over_its_keys(quantised):
    """With gradients, the operator for whole sequences serves the same call."""
    model, ids = ifx.patch_model(build(), GROWING), tokens(90)
    steps = {}
    for with_gradients in (False, True):
        cache, taken, new = QuantizedCache(config=model.config, **quantised), [], ids
        with torch.set_grad_enabled(with_gradients):
            for _ in range(STEPS):
                logits = model(new, **{CACHE: cache}).logits[:, -1].detach()
                new = logits.argmax(-1, keepdim=True)
                taken.append((logits, new))
        steps[with_gradients] = [torch.stack(x) for x in zip(*taken, strict=True)]
    for ours, theirs in zip(steps[False], steps[True], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    generated = generate(model, ids, quantised)[:, 90:]
    assert torch.equal(generated, steps[False][1][:, :, 0].T)


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from CUDA only")
def test_an_offloaded_cache_changes_nothing(kind):
    model, ids = ifx.patch_model(build(), GROWING), tokens(90)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": STEPS}
    model, ids = model.cuda(), ids.cuda()
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    # PyTorch 2.11 crashes when it compiles any model over an offloaded static cache.
    options |= {"cache_implementation": kind, "disable_compile": True}
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours, expected)


class Elsewhere(DynamicCache):
    """Offloads as on a GPU: attention gets a tensor that the layer no longer holds."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.offloading = False
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.offloading = True
        self.layers[layer_idx].offload()
        return out


def test_a_layer_that_was_offloaded_at_once_is_still_found(monkeypatch):
    def move(layer):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    monkeypatch.setattr(DynamicLayer, "offload", move)
    model, ids = ifx.patch_model(build(), GROWING), tokens(110)
    cache, states = Elsewhere(), []
    with torch.no_grad():
        steps = []
        for part in ids.split([90, 1, 1, 5, 13], 1):
            steps.append(model(part, **{CACHE: cache}).logits)
            states.append([getattr(layer, "infllm_state", None) for layer in cache.layers])
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-3, atol=2e-5)
    assert all(state is not None for state in states[1])
    for first, *others in zip(*states[1:], strict=True):
        assert all(state is first for state in others)


def test_an_offloaded_layer_keeps_no_room_behind():
    model, cache = ifx.patch_model(build(), GROWING), DynamicCache()
    with torch.no_grad():
        for ids in (tokens(90), tokens(1), tokens(1)):
            model(ids, **{CACHE: cache})
        layer = cache.layers[0]
        assert layer._key_buffer is not None
        layer.offload()
        assert layer._key_buffer is layer._value_buffer is None
        layer.prefetch()
        ours = model(tokens(2), **{CACHE: cache}).logits
        whole = torch.cat([tokens(90), tokens(1), tokens(1), tokens(2)], 1)
        theirs = model(whole, use_cache=False).logits[:, -2:]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def odd_config(family):
    """Some models store keys under another index than the layer's, or give attention other keys."""
    names = {"hrm_text": "HrmTextConfig", "zamba": "ZambaConfig", "jetmoe": "JetMoeConfig"}
    kind = getattr(transformers, names[family], None)
    if kind is None:
        pytest.skip("a version of transformers without it")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 256}
    sizes |= {"initializer_range": 0.3}
    if family == "hrm_text":
        return kind(**sizes, prefix_lm=False, embedding_scale=1.0, H_cycles=2, L_cycles=2)
    if family == "zamba":
        sizes |= {"num_hidden_layers": 6, "num_key_value_heads": 2, "initializer_range": 0.2}
        period = {"attn_layer_period": 2, "attn_layer_offset": 1}
        del sizes["head_dim"]
        return kind(**sizes, **period, num_logits_to_keep=200)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return kind(**sizes, num_key_value_heads=2, kv_channels=16, **experts)


@NO_KERNELS
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["hrm_text", "zamba", "jetmoe"])
def test_a_step_chooses_by_the_keys_that_it_is_handed(family, kind):
    """In float64, because these models amplify rounding."""
    model = ifx.patch_model(build(odd_config(family)).double(), GROWING)
    cache, ids = DynamicCache(config=model.config), tokens(119)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=130)
    with torch.no_grad():
        parts = ids.split([70, *[1] * 25, 4, 20] if family != "zamba" else [70, *[1] * 49], 1)
        steps = [model(part, **{CACHE: cache}).logits for part in parts]
        expected = model(ids, use_cache=False).logits
    # Zamba scans in float32.
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-5, atol=1e-4)


@NO_KERNELS
def test_a_hybrid_layer_grows_in_place_and_follows_what_is_done_to_it():
    model = ifx.patch_model(build(odd_config("zamba")).double(), GROWING)
    cache, ids, rows = DynamicCache(config=model.config), tokens(78), torch.tensor([1, 0])
    with torch.no_grad():
        for part in ids[:, :75].split([70, *[1] * 5], 1):
            model(part, **{CACHE: cache})
        hybrids = [x for x in cache.layers if getattr(x, "infllm_state", None) is not None]
        rooms = [x._key_buffer for x in hybrids]
        model(ids[:, 75:76], **{CACHE: cache})
        assert len(hybrids) == 2
        assert rooms == [x._key_buffer for x in hybrids]
        copied = copy.deepcopy(cache)
        assert not any("Followed" in type(x).__name__ for x in copied.layers)
        steps = []
        for which in (cache, copied):
            model(ids[:, 76:77], **{CACHE: which})
            which.reorder_cache(rows)
            steps.append(model(ids[rows, 77:78], **{CACHE: which}).logits)
        expected = model(ids[rows], use_cache=False).logits[:, -1:]
    for ours in steps:
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
