"""generate() of patched models gives the tokens of full forwards."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import infllm_flex as ifx
from tests.patch.generation import GROWING, OPTIONS, generate
from tests.patch.models import CACHE, FULL_ATTENTION, SETTINGS, build, tokens


@pytest.fixture
def model():
    return ifx.patch_model(build(), GROWING)


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
@pytest.mark.parametrize(("window", "score_dims"), [(1, 0), (4, 0), (1, 8), (4, 4)])
def test_a_cache_changes_nothing_where_queries_are_pooled(window, score_dims, options):
    windows = {"kernel_size": window, "kernel_stride": window, "score_dims": score_dims}
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
        ids = ids.remainder(7) + 3  # with repetitions, so that lookups find something
        options = {"prompt_lookup_num_tokens": 4}
    else:
        options = {"assistant_model": build(smaller(model.config))}
    options["max_new_tokens"] = 60
    assert torch.equal(generate(model, ids, **options), generate(model, ids, max_new_tokens=60))


@pytest.mark.parametrize("num_drafts", [5, 12, 25])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_drafts_checked_across_dense_len_are_what_they_are_one_by_one(num_drafts, cache):
    """The same call has dense and sparse drafts."""
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
    """A smaller model for drafts, which is wrong often enough."""
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
