"""Changes to a cache between steps: its compressed keys follow them, or are made anew."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

import infllm_flex as ifx
from infllm_flex.patch.huggingface.cache_updates import compressed_keys_of
from tests.inputs import draw_normal
from tests.patch.generation import GROWING, generate
from tests.patch.models import CACHE, SETTINGS, build, tokens


@pytest.fixture
def model():
    return ifx.patch_model(build(), GROWING)


class UsersLayer(DynamicLayer):
    """A class of layers that the package does not know."""


def test_a_cache_of_another_kind_is_served_from_its_keys(model):
    ids = tokens(90)
    cache = Cache(layer_class_to_replicate=UsersLayer)
    assert torch.equal(generate(model, ids, **{CACHE: cache}), generate(model, ids))
    assert type(cache.layers[0]) is UsersLayer


def test_dense_may_come_and_go_within_a_generation(model):
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=120)):
        with torch.no_grad():
            model(tokens(90), **{CACHE: cache})
            with ifx.dense(model):
                for _ in range(9):
                    model(tokens(1), **{CACHE: cache})
            last = model(tokens(1), **{CACHE: cache}).logits
        layer = cache.layers[0]
        keys = layer.infllm_state.compressed_keys
        key = layer.keys[:, :, :100]
        fresh = ifx.CompressedKeys(keys.config, key)
        fresh.append(key, 100)
        count = (100 - 8) // 4 + 1
        assert torch.equal(keys.compressed[:, :, :count], fresh.compressed[:, :, :count])
        assert last.isfinite().all()


CHANGES = {
    "crop": lambda cache: cache.crop(-13),
    "crop and go on": lambda cache: (cache.crop(-40), fill(cache, 30, seed=2)),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([False, True])),
    "offload": lambda cache: (cache.layers[0].offload(), cache.layers[0].prefetch()),
    "reset": lambda cache: (cache.reset(), fill(cache, 50, seed=3)),
    "by hand": lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys + 1),
    "copy": lambda cache: copy.deepcopy(cache),
}


def fill(cache, length, seed):
    B = 2 if not cache.layers or cache.layers[0].keys is None else cache.layers[0].keys.shape[0]
    key = draw_normal(B, 2, length, 16, seed=seed)
    cache.update(key, key, 0)


def update_state(cache, config):
    key = cache.layers[0].keys
    start = torch.zeros(key.shape[0], dtype=torch.int64)
    return compressed_keys_of(cache.layers[0], key, 1, start, config)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_state_follows_every_change_of_a_cache(change):
    config = ifx.InfLLMConfig.from_dict(SETTINGS)
    cache = DynamicCache()
    fill(cache, 100, seed=0)
    update_state(cache, config)
    changed = change(cache)
    for which in (cache, changed) if isinstance(changed, DynamicCache) else (cache,):
        fill(which, 7, seed=1)
        keys, key = update_state(which, config), which.layers[0].keys
        fresh = ifx.CompressedKeys(config, key)
        fresh.append(key, key.shape[2])
        for ours, theirs, count in (
            (keys.compressed, fresh.compressed, (key.shape[2] - 8) // 4 + 1),
            (keys.coarse, fresh.coarse, (key.shape[2] - 32) // 16 + 1),
        ):
            assert torch.equal(ours[:, :, :count], theirs[:, :, :count])
        assert (keys.end == key.shape[2]).all()


def test_a_tracked_layer_returns_what_a_plain_one_returns_without_a_copy():
    config = ifx.InfLLMConfig.from_dict(SETTINGS)
    caches = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for cache in caches:
            fill(cache, 100, seed=0)
        update_state(caches[0], config)
        addresses = set()
        for step in range(60):
            new = draw_normal(2, 2, 1 + step % 3, 16, seed=step)
            ours, theirs = (cache.update(new, 2 * new, 0) for cache in caches)
            addresses.add(ours[0].data_ptr())
            assert all(map(torch.equal, ours, theirs))
            del ours
            if step % 7 == 0:
                for cache in caches:
                    cache.crop(-2)
        assert len(addresses) <= 2
        for name in ("keys", "values"):
            assert torch.equal(*(getattr(cache.layers[0], name) for cache in caches))


def test_inference_mode_may_end_within_a_generation(model):
    cache, ids = DynamicCache(), tokens(90)
    with torch.inference_mode():
        model(ids, **{CACHE: cache})
        model(tokens(1), **{CACHE: cache})
    with torch.no_grad():
        ours = model(tokens(2), **{CACHE: cache}).logits
        whole = torch.cat([ids, tokens(1), tokens(2)], 1)
        theirs = model(whole, use_cache=False).logits[:, -2:]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("length", [30, 3])
def test_gradients_flow_through_a_cache(model, length, kind):
    caches = {"dynamic": DynamicCache(), "static": StaticCache(model.config, max_cache_len=130)}
    ids = tokens(120)
    with torch.no_grad():
        model(ids[:, :-length], **{CACHE: caches[kind]})
    ours = model(ids[:, -length:], **{CACHE: caches[kind]}).logits
    theirs = model(ids, use_cache=False).logits[:, -length:]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    ours.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()


def test_no_module_remembers_a_cache(model):
    def attributes():
        return {name: sorted(vars(module)) for name, module in model.named_modules()}

    before = attributes()
    generate(model, tokens(90))
    assert attributes() == before


def test_unpatching_removes_the_hooks_of_a_copy_as_well(model):
    for one in (model, copy.deepcopy(model)):
        ifx.unpatch_model(one)
        assert not any(module._forward_pre_hooks for module in one.modules())
        assert torch.equal(generate(one, tokens(90)), generate(build(), tokens(90)))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_mask_with_holes_is_refused(model, cache):
    if torch.get_default_device().type == "cuda":
        pytest.skip("there the device itself asserts it, which ends the process")
    ids, mask = tokens(90), torch.ones(2, 91, dtype=torch.int64)
    caches = {"dynamic": DynamicCache(), "static": StaticCache(model.config, max_cache_len=120)}
    with torch.no_grad():
        model(ids, **{CACHE: caches[cache]})
        mask[1, 20:30] = 0
        with pytest.raises(RuntimeError, match="serves rows that are padded on the left"):
            model(tokens(1), attention_mask=mask, **{CACHE: caches[cache]})


def test_keys_without_a_cache_that_is_known_are_refused(model):
    attention = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 100, 16)
    from infllm_flex.patch.huggingface.attention import attention_forward

    with pytest.raises(NotImplementedError, match="keys that no layer of a transformers cache"):
        attention_forward(attention, query, key, key, None)
