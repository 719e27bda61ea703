"""generate() of patched models gives what full forwards give, whatever the cache goes through."""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

import infllm_flex as ifx
from infllm_flex.patch.huggingface.cache_state import compressed_keys_of
from tests.inputs import draw_normal
from tests.patch.models import CACHE, FULL_ATTENTION, SETTINGS, build, tokens

# 48 tokens are fewer than the five blocks of the budget: up to there, sparse attention is dense. So
# positions that a short prompt attended densely are those of a full forward, where all are sparse.
# Two of the five are chosen: stale compressed keys would choose others.
GROWING = {**SETTINGS, "dense_len": 48, "topk": 4}
OPTIONS = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 40}


@pytest.fixture
def model():
    return ifx.patch_model(build(), GROWING)


def generate(model, ids, **options):
    torch.manual_seed(0)
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **{**OPTIONS, **options})


# Gemma 2 has sliding windows in every other layer.
@pytest.mark.parametrize("family", [*FULL_ATTENTION, "gemma2"])
def test_generation_past_dense_len_is_the_loop_of_full_forwards(family):
    model = ifx.patch_model(build(family), GROWING)
    ids = tokens(44)
    expected = ids
    with torch.no_grad():
        for _ in range(OPTIONS["max_new_tokens"]):
            last = model(expected, use_cache=False).logits[:, -1]
            expected = torch.cat([expected, last.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, ids), expected)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3, "prefill_chunk_size": 30}, id="beams in chunks"),
        pytest.param({"cache_implementation": "static"}, id="static"),
    ],
)
@pytest.mark.parametrize("window", [1, 4])
def test_a_cache_changes_nothing_where_queries_are_pooled(window, options):
    windows = {"kernel_size": window, "kernel_stride": window}
    settings = {**GROWING, **windows, "pool_queries": True, "score_dtype": "float8"}
    model = ifx.patch_model(build(), settings)
    ids = tokens(90)
    expected = generate(model, ids, use_cache=False, num_beams=options.get("num_beams", 1))
    assert torch.equal(generate(model, ids, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": True, "top_k": 8, "num_return_sequences": 2}, id="sampling"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"prefill_chunk_size": 13}, id="small chunks"),
        pytest.param({"prefill_chunk_size": 30}, id="large chunks"),
        pytest.param({"cache_implementation": "static"}, id="static"),
        pytest.param({"cache_implementation": "static", "prefill_chunk_size": 30}, id="both"),
    ],
)
def test_a_cache_changes_nothing(model, options):
    without = {k: v for k, v in options.items() if k in ("do_sample", "top_k", "num_beams")}
    without["num_return_sequences"] = options.get("num_return_sequences", 1)
    ids = tokens(90)
    expected = generate(model, ids, use_cache=False, **without)
    assert torch.equal(generate(model, ids, **options), expected)


@pytest.mark.parametrize("settings", [GROWING, SETTINGS], ids=["sparse", "turns sparse"])
@pytest.mark.parametrize("how", ["model", "lookup"])
def test_assisted_decoding_crops_what_was_not_accepted(how, settings):
    model, ids = ifx.patch_model(build(), settings), tokens(60, batch=1)
    if how == "lookup":
        ids = ids.remainder(7) + 3  # with repetitions, so that there is something to look up
        options = {"prompt_lookup_num_tokens": 4}
    else:
        options = {"assistant_model": build(smaller(model.config))}
    options["max_new_tokens"] = 60
    assert torch.equal(generate(model, ids, **options), generate(model, ids, max_new_tokens=60))


@pytest.mark.parametrize("num_drafts", [5, 12, 25])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_drafts_checked_across_dense_len_are_what_they_are_one_by_one(num_drafts, cache):
    """Some of them are dense and some sparse in the same call."""
    model = ifx.patch_model(build(), SETTINGS)
    ids = tokens(105)
    caches = {
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=140),
    }
    with torch.no_grad():
        several, alone = caches[cache](), caches[cache]()
        for which in several, alone:
            model(ids[:, :80], **{CACHE: which})
        ours, ones = (
            torch.cat([model(x, **{CACHE: which}).logits for x in ids[:, 80:].split(count, 1)], 1)
            for which, count in ((several, num_drafts), (alone, 1))
        )
    torch.testing.assert_close(ours, ones, rtol=1e-3, atol=5e-5)


def smaller(config):
    """A smaller model for drafts, wrong often enough."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    return config


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_padded_rows_generate_what_they_generate_alone(options):
    model = ifx.patch_model(build(), SETTINGS, dense_len=60)
    prompts = [tokens(length, batch=1) for length in (75, 5, 50)]  # sparse, dense, growing
    longest = max(ids.shape[1] for ids in prompts)
    pads = [longest - ids.shape[1] for ids in prompts]
    padded = [torch.nn.functional.pad(x, (p, 0)) for x, p in zip(prompts, pads, strict=True)]
    mask = torch.arange(longest) >= torch.tensor(pads)[:, None]
    together = generate(model, torch.cat(padded), attention_mask=mask.long(), **options)
    for row, (ids, pad) in enumerate(zip(prompts, pads, strict=True)):
        alone = generate(model, ids, **options)[0]
        assert torch.equal(together[row, pad:], alone)


def test_two_generations_may_take_turns(model):
    prompts = [tokens(70), tokens(90)]
    caches = [DynamicCache(), StaticCache(config=model.config, max_cache_len=120)]
    steps = [[], []]
    inputs = list(prompts)
    with torch.no_grad():
        for _ in range(20):
            for turn in range(2):
                out = model(inputs[turn], **{CACHE: caches[turn]}).logits[:, -1:]
                inputs[turn] = out.argmax(-1)
                steps[turn].append(inputs[turn])
    for ids, made in zip(prompts, steps, strict=True):
        assert torch.equal(torch.cat(made, 1), generate(model, ids, max_new_tokens=20)[:, -20:])


def test_a_static_cache_compiles_once_for_300_tokens(model):
    ids, mask = tokens(50), torch.ones(2, 50, dtype=torch.int64)
    mask[0, :7] = 0
    # The graphs are what counts here; to make them fast takes ten times as long.
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
    # As generate() does where it prefills a static cache in chunks on a GPU.
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
            assert tensor._dynamo_static_input_type == "unguarded"  # marked, so not of a graph


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
    cache.reset()  # and no row remembers that it was padded
    assert torch.equal(generate(model, ids, **{CACHE: cache}), generate(model, ids))


class UsersLayer(DynamicLayer):
    """A kind of layer that nobody knows."""


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


def follow(cache, config):
    key = cache.layers[0].keys
    start = torch.zeros(key.shape[0], dtype=torch.int64)
    return compressed_keys_of(cache.layers[0], key, 1, start, config)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_state_follows_what_is_done_to_a_cache(change):
    config = ifx.InfLLMConfig.from_dict(SETTINGS)
    cache = DynamicCache()
    fill(cache, 100, seed=0)
    follow(cache, config)
    changed = change(cache)
    for which in (cache, changed) if isinstance(changed, DynamicCache) else (cache,):
        fill(which, 7, seed=1)
        keys, key = follow(which, config), which.layers[0].keys
        fresh = ifx.CompressedKeys(config, key)
        fresh.append(key, key.shape[2])
        for ours, theirs, count in (
            (keys.compressed, fresh.compressed, (key.shape[2] - 8) // 4 + 1),
            (keys.coarse, fresh.coarse, (key.shape[2] - 32) // 16 + 1),
        ):
            assert torch.equal(ours[:, :, :count], theirs[:, :, :count])
        assert (keys.end == key.shape[2]).all()


def test_a_followed_layer_returns_what_a_plain_one_returns_without_copying_it():
    config = ifx.InfLLMConfig.from_dict(SETTINGS)
    caches = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for cache in caches:
            fill(cache, 100, seed=0)
        follow(caches[0], config)
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


def test_unpatching_takes_the_hooks_away_also_from_a_copy(model):
    for one in (model, copy.deepcopy(model)):
        ifx.unpatch_model(one)
        assert not any(module._forward_pre_hooks for module in one.modules())
        assert torch.equal(generate(one, tokens(90)), generate(build(), tokens(90)))


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
