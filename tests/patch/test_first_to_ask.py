"""Masks over a cache, and positions in a graph, are checked whichever layers run."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import infllm_flex as ifx
from tests.patch.models import CACHE, SETTINGS, build, tokens

PROMPT, NEW = 110, 40
HOLE = slice(30, 50)
REFUSED = "serves rows that are padded on the left"
CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(model.config, max_cache_len=160),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Two(torch.nn.Module):
    """Two models, of which the call says which one runs; both or one of them may be the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = build(), build()

    def forward(self, *args, **kwargs):
        return self.second(*args, **kwargs)


def skip_first_layer(model):
    """An early exit from the other end: only the last layer runs."""
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.model.layers[0].self_attn.layer_idx = 0
    return model


PARTS = {
    "second model": lambda: ifx.patch_model(Two(), SETTINGS).second,
    "second model, by the wrapper": lambda: ifx.patch_model(Two(), SETTINGS),
    "last layer": lambda: skip_first_layer(ifx.patch_model(build(), SETTINGS)),
}


def step(model, cache, new, hidden=slice(0), function=None):
    inner = getattr(model, "second", model)
    ids, mask = tokens(PROMPT), torch.ones(2, PROMPT + new, dtype=torch.int64)
    with torch.no_grad():
        cache = CACHES[cache](inner)
        inner(ids, **{CACHE: cache})
        mask[1, hidden] = 0
        function = model if function is None else function
        return function(tokens(new), attention_mask=mask, **{CACHE: cache})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("new", [1, NEW])
def test_a_hole_over_a_cache_is_refused_whoever_asks_first(part, cache, new):
    model = PARTS[part]()
    step(model, cache, new)
    with pytest.raises(RuntimeError, match=REFUSED):
        step(model, cache, new, HOLE)


@pytest.mark.parametrize("part", ["second model", "last layer"])
def test_in_a_graph_too(part):
    model = PARTS[part]()
    function = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(model, "static", 1, function=function)
    with pytest.raises(RuntimeError, match=REFUSED):
        step(model, "static", 1, HOLE, function)


@pytest.mark.parametrize("part", ["second model", "last layer"])
def test_documents_in_a_short_graph_are_refused(part):
    model = PARTS[part]()
    function = torch.compile(model, backend="aot_eager", fullgraph=True)
    positions = torch.arange(60)[None]
    with torch.no_grad():
        function(tokens(60), position_ids=positions)
        with pytest.raises(RuntimeError, match="documents that only position_ids mark"):
            function(tokens(60), position_ids=positions % 25)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("new", [1, NEW])
def test_one_layer_checks_for_all(monkeypatch, cache, new):
    from infllm_flex.patch.huggingface import cached_attention

    checks = []

    def keep(query, *check):
        checks.append(check)
        return query

    monkeypatch.setattr(cached_attention, "assert_in_graph", keep)
    step(ifx.patch_model(build(), SETTINGS), cache, new, slice(9))
    assert len(checks) == 1
