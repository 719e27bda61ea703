"""Users keep, copy, save and change a cache's tensors as with transformers' own layers."""

import copy
import io
import pickle
import pickletools

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import infllm_flex as ifx
from infllm_flex.patch.huggingface import growable_buffer
from infllm_flex.patch.huggingface.cache_layer import TrackedDynamicLayer
from tests.inputs import draw_normal
from tests.patch.generation import GROWING
from tests.patch.models import CACHE, build, tokens

EVERYTHING = {**GROWING, "topk": 16}


@pytest.fixture(params=["no_grad", "inference_mode"])
def quiet(request):
    with getattr(torch, request.param)():
        yield


@pytest.fixture
def model():
    return ifx.patch_model(build(), GROWING)


def begin(model, length=90, steps=3):
    """A cache after a prompt and some steps, so that its layers grow in place."""
    cache = DynamicCache(config=model.config)
    step(model, cache, tokens(length))
    for seed in range(steps):
        step(model, cache, tokens(1 + seed % 2))
    assert not steps or all(type(layer) is TrackedDynamicLayer for layer in cache.layers)
    return cache


def step(model, cache, ids):
    return model(ids, **{CACHE: cache}).logits


def fresh(cache):
    """A new cache of equal content."""
    other = DynamicCache()
    for i, layer in enumerate(cache.layers):
        other.update(layer.keys.clone(), layer.values.clone(), i)
    return other


def shallow(cache):
    """Another container of the same tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def by_attributes(cache):
    other = copy.copy(cache)
    other.layers = []
    for layer in cache.layers:
        twin = type(layer).__new__(type(layer))
        twin.__dict__.update(layer.__dict__)
        other.layers.append(twin)
    return other


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def assert_as_fresh(model, cache, ids):
    other = fresh(cache)
    assert_same(step(model, cache, ids), step(model, other, ids))


def test_tensors_that_were_kept_never_change(quiet, model):
    cache, kept = begin(model), []

    def keep():
        for layer in cache.layers:
            kept.extend((x, x.clone()) for x in (layer.keys, layer.values))
            kept.append((layer.keys[:, 1:, -5:], layer.keys[:, 1:, -5:].clone()))

    keep()
    for ids in (tokens(1), tokens(5), tokens(20)):
        step(model, cache, ids)
        keep()
        cache.crop(-3)
        step(model, cache, tokens(2))
        keep()
    cache.reorder_cache(torch.tensor([1, 0]))
    step(model, cache, tokens(3))
    for tensor, content in kept:
        assert torch.equal(tensor, content)


def test_tensors_that_attention_was_handed_never_change(quiet, model):
    """A hook, or another attention function, may keep them."""
    cache, kept = begin(model), []
    for seed in range(8):
        new = draw_normal(2, 2, 1 + seed % 3, 16, seed=seed)
        handed = cache.update(new, new, 0)
        if seed % 2:
            handed = [x[:, 1:, 4:] for x in handed]  # only a part of it
        kept.extend((x, x.clone()) for x in handed)
        del handed
        cache.crop(-2)
    for tensor, content in kept:
        assert torch.equal(tensor, content)


def test_an_end_that_nobody_holds_is_written_again_without_a_copy(model, monkeypatch):
    """Drafts that are checked and dropped do not copy the cache every time."""
    made = []

    class Counted(growable_buffer.GrowableBuffer):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr("infllm_flex.patch.huggingface.cache_layer.GrowableBuffer", Counted)
    with torch.no_grad():
        cache = begin(model, steps=0)
        for _ in range(10):
            step(model, cache, tokens(6))
            cache.crop(-4)
        assert len(made) == 4  # keys and values of two layers
        monkeypatch.delattr(torch._C, "_storage_Use_Count")
        step(model, cache, tokens(6))
        assert len(made) == 8  # without a count of users, the cache is copied


@pytest.mark.parametrize("duplicate", [shallow, by_attributes])
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_that_share_a_prefix_go_their_own_ways(quiet, model, duplicate, steps):
    cache = begin(model, steps=steps)
    talks = [cache, duplicate(cache), duplicate(cache)]
    alone = [copy.deepcopy(cache) for _ in talks]
    for turn in range(5):
        for which, (ours, theirs) in enumerate(zip(talks, alone, strict=True)):
            ids = tokens(100 + 7 * turn + which)[:, : 1 + (turn + which) % 3]
            assert_same(step(model, ours, ids), step(model, theirs, ids))
            if turn == 2 and which == 1:
                ours.crop(-4)
                theirs.crop(-4)
    for ours, theirs in zip(talks, alone, strict=True):
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            assert_same(mine.keys, other.keys)
            assert_same(mine.values, other.values)


def test_what_a_user_reads_is_contiguous_and_his_own(quiet, model):
    cache = begin(model)
    with ifx.dense(model):
        plain = DynamicCache()
        for ids in (tokens(90), tokens(1), tokens(2), tokens(1)):
            step(model, plain, ids)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        for name in ("keys", "values"):
            tensor, other = getattr(ours, name), getattr(theirs, name)
            assert tensor.is_contiguous()
            assert tensor.view(2, -1).shape == other.view(2, -1).shape
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert getattr(ours, name) is tensor
    for keys, values, *_ in cache:
        assert keys.is_contiguous()
        assert values.is_contiguous()


def test_a_saved_cache_is_one_of_transformers(model):
    with torch.no_grad():
        cache = begin(model)
        plain = fresh(cache)
        saved = pickle.dumps(cache)
        names = {arg for _, arg, _ in pickletools.genops(saved) if isinstance(arg, str)}
        assert not any("infllm" in name for name in names)
        sizes = []
        for one in (cache, plain):
            file = io.BytesIO()
            torch.save(one, file)
            sizes.append(file.tell())
        assert sizes[0] <= sizes[1] + 500
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        copied = copy.deepcopy(cache)
        assert all(type(layer) is DynamicLayer for layer in loaded.layers + copied.layers)
        expected = step(model, plain, tokens(2))
        for one in (pickle.loads(saved), loaded, copied, cache):
            assert_same(step(model, one, tokens(2)), expected)


def test_a_saved_static_cache_is_one_of_transformers(model):
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=130)
        step(model, cache, tokens(90))
        saved = pickle.dumps(cache)
        loaded, copied = pickle.loads(saved), copy.deepcopy(cache)
        names = {arg for _, arg, _ in pickletools.genops(saved) if isinstance(arg, str)}
        assert not any("infllm_flex" in name for name in names)
        expected = step(model, cache, tokens(3))
        assert_same(step(model, loaded, tokens(3)), expected)
        assert_same(step(model, copied, tokens(3)), expected)


def other_keys(x):
    return torch.flip(x, (2,)) * 0.7


EDITS = {
    "slice": lambda layer: layer.keys[:, :, 20:70].mul_(-1.5),
    "assign": lambda layer: layer.keys.__setitem__((slice(None), 1), 0.3),
    "index_copy_": lambda layer: layer.keys.index_copy_(
        2, torch.arange(40, 60), other_keys(layer.keys)[:, :, 40:60]
    ),
    "data": lambda layer: layer.keys.data.mul_(-1),
    "numpy": lambda layer: layer.keys.numpy().__setitem__(slice(0, 1), 0.1),
    "set": lambda layer: setattr(layer, "keys", other_keys(layer.keys)),
    "augmented": lambda layer: setattr(layer, "keys", layer.keys.add_(0.25)),
    "values": lambda layer: layer.values.mul_(2),
    "a view that was kept": lambda layer: layer.kept.mul_(-1),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_keys_changed_in_place_are_compressed_anew(quiet, model, edit):
    cache = begin(model)
    for layer in cache.layers:
        layer.kept = layer.keys[:, :, 10:50]
        edit(layer)
    assert_as_fresh(model, cache, tokens(2))
    for layer in cache.layers:
        edit(layer)  # the kept tensor is no longer the cache's
    assert_as_fresh(model, cache, tokens(1))


def test_handed_keys_changed_in_place_are_compressed_anew(model):
    """For example by another attention function, before a step of ours."""
    with torch.no_grad():
        cache = begin(model)
        for i in range(len(cache.layers)):
            new = draw_normal(2, 2, 2, 16, seed=i)
            key, _ = cache.update(new, new, i)
            key[:, :, 10:60] *= -1
            del key
        assert_as_fresh(model, cache, tokens(2))


STATIC_EDITS = {name: EDITS[name] for name in ("slice", "assign", "index_copy_", "values")}


@pytest.mark.parametrize("edit", STATIC_EDITS.values(), ids=STATIC_EDITS)
def test_keys_of_a_static_cache_changed_in_place_are_compressed_anew(model, edit):
    def new():
        return StaticCache(config=model.config, max_cache_len=130)

    with torch.no_grad():
        cache, other = new(), new()
        for ids in (tokens(90), tokens(1), tokens(2)):
            step(model, cache, ids)
        for i, layer in enumerate(cache.layers):
            edit(layer)
            other.update(layer.keys[:, :, :93].clone(), layer.values[:, :, :93].clone(), i)
        for ids in (tokens(2), tokens(1)):
            assert_same(step(model, cache, ids), step(model, other, ids))


def test_a_static_cache_that_went_on_unpatched_is_compressed_anew(model):
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=130)
        step(model, cache, tokens(90))
        ifx.unpatch_model(model)
        for _ in range(9):
            step(model, cache, tokens(1))
        ifx.patch_model(model, GROWING)
        other = StaticCache(config=model.config, max_cache_len=130)
        for i, layer in enumerate(cache.layers):
            other.update(layer.keys[:, :, :99].clone(), layer.values[:, :, :99].clone(), i)
        assert_same(step(model, cache, tokens(1)), step(model, other, tokens(1)))


def test_a_generation_never_reads_what_it_holds(model, monkeypatch):
    """A read would make the next token copy the cache."""
    read = []
    for name in ("keys", "values"):
        own = getattr(TrackedDynamicLayer, name)
        monkeypatch.setattr(
            TrackedDynamicLayer,
            name,
            property(lambda self, own=own: read.append(self) or own.fget(self), own.fset),
        )
    ids = tokens(90)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 20}
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    model.generate(ids[:1].remainder(7) + 3, prompt_lookup_num_tokens=4, **options)
    model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, **options)
    assert not read


def test_keys_of_another_dtype_are_taken_in_as_by_transformers(model):
    with torch.no_grad():
        caches = begin(model), DynamicCache()
        caches[1].update(caches[0].layers[0].keys, caches[0].layers[0].values, 0)
        for dtype in (torch.float64, torch.bfloat16):
            new = draw_normal(2, 2, 3, 16, seed=1).to(dtype)
            ours, theirs = (cache.update(new, new, 0) for cache in caches)
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.dtype == other.dtype == torch.float64
                assert torch.equal(mine, other)
