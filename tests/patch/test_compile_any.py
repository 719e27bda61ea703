"""Patched models of any style compile as one graph: whole or by block, before or after patching."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import infllm_flex as ifx
from tests.patch.library_models import LIBRARY_MODELS
from tests.patch.models import LONG, SETTINGS, SHORT, build, tokens
from tests.patch.plain_models import CachedHeads, FusedHeads, plain_model
from tests.patch.test_refusals import MASKS, Masked
from tests.patch.test_sdpa_adapter import assert_close, run
from tests.patch.test_training_loops import KINDS

# Dynamo reads the gradient of every input, and PyTorch warns that inner ones have none.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
WAYS = {"F.scaled_dot_product_attention": "repeated", **LIBRARY_MODELS}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiled:
    """A model compiled as a whole or by block, which still has its parameters."""

    def __init__(self, model, by_block=False, backend="aot_eager", **options):
        self.model, self.function = model, model
        options = {"fullgraph": True, "backend": backend, **options}
        if by_block:
            for block in model.h:
                block.compile(**options)
        else:
            self.function = torch.compile(model, **options)

    def __call__(self, *args):
        return self.function(*args)

    def __getattr__(self, name):
        return getattr(self.model, name)


@pytest.mark.private_api
@pytest.mark.parametrize("by_block", [False, True], ids=["whole", "by block"])
@pytest.mark.parametrize("style", WAYS.values(), ids=WAYS)
def test_one_graph_forward_and_backward(style, by_block):
    model = ifx.patch_model(plain_model(style, layers=1), SETTINGS)
    eager = run(model, LONG)
    assert_close(run(Compiled(model, by_block), LONG), eager)


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_below_dense_len_the_graph_is_that_of_the_unpatched_model(make):
    # Equal operations cost nothing; no timing shows that as well.
    model = plain_model(make, layers=1)
    assert graph_of(ifx.patch_model(model, SETTINGS)) == graph_of(ifx.unpatch_model(model))


@pytest.mark.parametrize("given", [True, False])
def test_below_dense_len_one_layer_of_transformers_checks_the_positions_it_is_given(given):
    kwargs = {"position_ids": torch.arange(SHORT)[None]} if given else {}
    model = ifx.patch_model(build(), SETTINGS)
    patched = [target for target, *_ in graph_of(model, **kwargs)]
    plain = [target for target, *_ in graph_of(ifx.unpatch_model(model), **kwargs)]
    products = ("aten.mm", "aten.bmm", "aten.addmm", "aten._scaled", "aten.mul")
    assert [x for x in patched if x.startswith(products)] == [
        x for x in plain if x.startswith(products)
    ]
    assert len(patched) - len(plain) < 30  # over tokens, not over pairs or heads
    assert sum("assert_async" in x for x in patched) == given


def graph_of(model, **kwargs):
    """The operations that reach a compiler, in order."""
    found = []

    def keep(graph, inputs):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        found.extend((str(node.target), str(node.args), str(node.kwargs)) for node in calls)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        backend = aot_autograd(fw_compiler=keep)
        torch.compile(model, fullgraph=True, backend=backend)(tokens(SHORT), **kwargs)
    assert found
    return found


@pytest.mark.parametrize("by_block", [False, True], ids=["whole", "by block"])
def test_patching_and_unpatching_after_compiling_take_effect(by_block):
    model = plain_model(layers=1)
    plain = model(tokens(LONG))
    compiled = Compiled(model, by_block)
    assert_close([compiled(tokens(LONG))], [plain])
    ifx.patch_model(model, SETTINGS)
    sparse = model.head(model.h[0](embed(model)))
    assert_close([compiled(tokens(LONG))], [sparse])
    with ifx.dense(model):
        assert_close([compiled(tokens(LONG))], [plain])
    ifx.unpatch_model(model)
    assert_close([compiled(tokens(LONG))], [plain])


def embed(model):
    return model.wte(tokens(LONG)) + model.wpe(torch.arange(LONG))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_inside_the_graph(kind):
    model = ifx.patch_model(plain_model(layers=1), SETTINGS)
    plain = run(model, LONG)
    model.checkpointing = KINDS[kind]
    assert_close(run(Compiled(model), LONG), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_around_the_graph(kind):
    model = ifx.patch_model(plain_model(layers=1), SETTINGS)
    plain = run(model, LONG)
    model.checkpointing = KINDS[kind]
    assert_close(run(Compiled(model, by_block=True), LONG), plain)


def test_blocks_share_one_graph():
    model = ifx.patch_model(plain_model(layers=6), SETTINGS)
    counter = CompileCounterWithBackend("eager")
    Compiled(model, by_block=True, backend=counter)(tokens(LONG))
    assert counter.frame_count == 1


LENGTHS = {
    "generic": (plain_model, None),
    "generic by block": (plain_model, "h"),
    "transformers": (build, None),
}


@pytest.mark.parametrize("case", LENGTHS.values(), ids=LENGTHS)
def test_fifty_lengths_take_at_most_four_graphs(case):
    make, blocks = case
    model = ifx.patch_model(make(), SETTINGS).train()
    counter = CompileCounterWithBackend("eager")
    function = model
    if blocks is None:
        function = torch.compile(model, fullgraph=True, backend=counter)
    else:
        for block in model.get_submodule(blocks):
            block.compile(fullgraph=True, backend=counter)
    kwargs = {} if make is plain_model else {"use_cache": False}
    lengths = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:50] + 60
    assert lengths.min() < SETTINGS["dense_len"] < lengths.max()
    for length in lengths.tolist():
        function(tokens(length, batch=1), **kwargs)
    assert counter.frame_count <= 4


@torch.compile(backend="eager")
def compiled_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CompiledHelper(FusedHeads):
    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        return self.c_proj(compiled_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_helper_that_is_compiled_by_itself():
    model = ifx.patch_model(plain_model(CompiledHelper, layers=1), SETTINGS)
    theirs = run(ifx.patch_model(plain_model("fused", layers=1), SETTINGS), LONG)
    for _ in range(3):
        assert_close(run(model, LONG), theirs)


def test_a_causal_mask_is_checked_inside_the_graph():
    layer = ifx.patch_model(Masked(), SETTINGS)
    x, causal = torch.randn(1, LONG, 64), torch.ones(LONG, LONG, dtype=torch.bool).tril()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close([compiled(x, causal)], [layer(x, causal)])
    with pytest.raises(RuntimeError, match="an attention mask beyond plain causal"):
        compiled(x, MASKS["a window"])


def test_wrong_heads_are_found_inside_the_graph():
    model = ifx.patch_model(plain_model(layers=1), SETTINGS, num_key_value_heads=2)
    with pytest.raises(RuntimeError, match="keys of 4 heads are not 2 expanded ones"):
        Compiled(model)(tokens(LONG))


def test_cycled_heads_are_known_after_one_eager_run():
    model = ifx.patch_model(plain_model("cycled", layers=1), SETTINGS)
    with pytest.raises(RuntimeError, match=r"run once without torch\.compile"):
        Compiled(model)(tokens(LONG))
    eager = model(tokens(LONG))
    assert_close([Compiled(model)(tokens(LONG))], [eager])


def test_a_static_cache_at_sparse_length_is_refused_by_name():
    model = ifx.patch_model(plain_model(CachedHeads, layers=1), SETTINGS)
    with pytest.raises(
        Exception, match=r"a preallocated cache, cannot be served by torch\.compile"
    ):
        Compiled(model)(tokens(1), torch.tensor([120]))


@pytest.mark.slow
@pytest.mark.parametrize("length", [SHORT, LONG])
def test_training_through_inductor(length):
    model = ifx.patch_model(plain_model("repeated", layers=1), SETTINGS)
    model.checkpointing = KINDS["non-reentrant"]
    assert_close(run(Compiled(model, backend="inductor"), length), run(model, length))
