"""Padding that changes between steps: the compressed keys follow it, as in a cache read anew."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import infllm_flex as ifx
from tests.patch.models import CACHE, SETTINGS, build, tokens

PROMPT = 170
MORE = {"kernel_size": 16, "kernel_stride": 8, "topk": 3}
KINDS = {
    "windows": SETTINGS,
    "other windows": {**SETTINGS, **MORE},
    "default": {"block_size": 16, "topk": 4, "dense_len": 96, "engine": "fused"},
}


def padding(length, *pads):
    return (torch.arange(length) >= torch.tensor(pads)[:, None]).long()


def table(length, *pads):
    """The same as `generate` passes it to compiled steps."""
    mask = torch.zeros(2, 1, 1, PROMPT + 40, dtype=torch.bool)
    mask[:, 0, 0, :length] = padding(length, *pads).bool()
    return mask


def steps(kind, cache, before, after, new, anew=False, compiled=False):
    """Logits of ``new`` tokens whose rows are padded otherwise than those before."""
    model = ifx.patch_model(build(), KINDS[kind])
    if cache == "dynamic":
        cache = DynamicCache()
    else:
        cache = StaticCache(model.config, max_cache_len=PROMPT + 40)
    function = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    make_mask = table if compiled else padding
    ids, length = tokens(PROMPT + 40), PROMPT + 1
    with torch.no_grad():
        model(ids[:, :PROMPT], attention_mask=padding(PROMPT, *before), **{CACHE: cache})
        mask = make_mask(length, *before)
        positions = torch.full((2, 1), PROMPT)
        function(
            ids[:, PROMPT:length], attention_mask=mask, position_ids=positions, **{CACHE: cache}
        )
        if anew:
            for layer in cache.layers:
                layer.infllm_state = None
        mask = make_mask(length + new, *after)
        positions = torch.arange(length, length + new).repeat(2, 1)
        ids = ids[:, length : length + new]
        return function(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("new", [1, 5, 30])
@pytest.mark.parametrize(("before", "after"), [((0, 0), (21, 0)), ((0, 35), (3, 6))])
def test_keys_are_compressed_from_the_new_first_tokens(kind, cache, new, before, after):
    ours = steps(kind, cache, before, after, new)
    theirs = steps(kind, cache, before, after, new, anew=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_chunk_and_its_tokens_agree():
    chunk = steps("windows", "dynamic", (0, 0), (21, 0), 30)[:, :1]
    torch.testing.assert_close(
        steps("windows", "dynamic", (0, 0), (21, 0), 1), chunk, rtol=1e-3, atol=1e-4
    )


def test_in_one_graph():
    with torch._dynamo.config.patch(error_on_recompile=True):
        ours = steps("windows", "static", (0, 0), (21, 0), 1, compiled=True)
    torch.compiler.reset()
    theirs = steps("windows", "static", (0, 0), (21, 0), 1, anew=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
