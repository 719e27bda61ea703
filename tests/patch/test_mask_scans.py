"""A decode step asks a mask once where rows begin, for all layers, and forgets the answer."""

import collections
import gc

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import infllm_flex as ifx
from infllm_flex.patch.forward_context import ForwardContext
from infllm_flex.patch.running_forward import current_forward
from tests.patch.generation import GROWING, generate
from tests.patch.models import CACHE, CONFIGS, build, gemma2, tokens

LAYERS, CAPACITY, PROMPT = 4, 160, 90
# Reductions that `first_visible_slots` makes of the mask; the others judge it.
SCANS = ("any.dim", "argmax.default")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model():
    return deep("llama")


def deep(name):
    config = CONFIGS[name]()
    if name == "gemma2":
        config = gemma2(num_hidden_layers=LAYERS)
    config.num_hidden_layers = LAYERS
    return ifx.patch_model(build(config), GROWING)


def padding(length, pads):
    """``[B, length]``, zeros before each row's first token."""
    return (torch.arange(length) >= torch.tensor(pads)[:, None]).long()


def table(length, pads):
    """The same as ``[B, 1, 1, CAPACITY]``, as `generate` passes it to compiled steps."""
    mask = torch.zeros(len(pads), 1, 1, CAPACITY, dtype=torch.bool)
    mask[:, 0, 0, :length] = padding(length, pads).bool()
    return mask


MASKS = {"padding": padding, "table": table}


def prefilled(model, pads, make_cache=None):
    cache = make_cache() if make_cache else StaticCache(model.config, max_cache_len=CAPACITY)
    with torch.no_grad():
        model(tokens(PROMPT), attention_mask=padding(PROMPT, pads), **{CACHE: cache})
    return cache


def step(model, cache, mask):
    with torch.no_grad():
        return model(tokens(1), attention_mask=mask, **{CACHE: cache}).logits


def expected_step(model, pads):
    """Logits of the same token in a forward without a cache."""
    ids = torch.cat([tokens(PROMPT), tokens(1)], 1)
    with torch.no_grad():
        return model(ids, attention_mask=padding(PROMPT + 1, pads), use_cache=False).logits[:, -1:]


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_graph_scans_the_mask_once(family, form):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = deep(family)  # every other layer of Gemma 2 has a window, and a mask of its own
    cache = prefilled(model, (7, 0))
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    mask = MASKS[form](PROMPT + 1, (7, 0))
    if family == "gemma2" and form == "table":
        mask = {"full_attention": mask, "sliding_attention": mask[..., :32]}
    step(compiled, cache, mask)
    counts = collections.Counter(str(node.target) for graph in graphs for node in graph.graph.nodes)
    sparse_layers = LAYERS if family == "llama" else LAYERS // 2
    assert counts["infllm_flex.select_cached_blocks.default"] == sparse_layers
    assert {name: counts[f"aten.{name}"] for name in SCANS} == dict.fromkeys(SCANS, 1)


class Counts(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make_cache", [None, DynamicCache], ids=["static", "dynamic"])
def test_an_eager_step_scans_the_mask_once(model, make_cache):
    cache = prefilled(model, (7, 0), make_cache)
    with Counts() as seen:
        step(model, cache, padding(PROMPT + 1, (7, 0)))
    assert seen.counts["aten.argmax.default"] == 1


@pytest.mark.slow
def test_one_graph_serves_other_padding_and_the_same_cache_again(model):
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    cache, mask = None, table(PROMPT + 1, (0, 0))
    for pads in ((7, 0), (0, 33), (0, 0)):
        if cache is None:
            cache = prefilled(model, pads)
        else:
            cache.reset()
            prefilled(model, pads, lambda cache=cache: cache)
        mask.copy_(table(PROMPT + 1, pads))  # the same tensor, as a CUDA graph has it
        assert_close(step(compiled, cache, mask), expected_step(model, pads))


def forwards() -> list[ForwardContext]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is ForwardContext]


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_nothing_of_a_forward_survives_it(model, how):
    function = torch.compile(model, backend="aot_eager", fullgraph=True)
    function = model if how == "eager" else function
    mask = table(PROMPT + 1, (0, 0))
    earlier = forwards()  # a model without hooks, in another test, keeps its last one
    for pads in ((7, 0), (0, 33)):
        mask.copy_(table(PROMPT + 1, pads))
        ours = step(function, prefilled(model, pads), mask)
        assert_close(ours, expected_step(model, pads))
        assert current_forward() is None
        assert not [x for x in forwards() if not any(x is other for other in earlier)]
    assert not hasattr(mask, "infllm_forward")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_over_a_static_cache_are_those_without_a_cache(model, options):
    ids, mask = tokens(PROMPT), padding(PROMPT, (7, 0))
    expected = generate(model, ids, attention_mask=mask, use_cache=False, **options)
    static = generate(model, ids, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(static, expected)
