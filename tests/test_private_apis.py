"""Each private API of PyTorch still does what `infllm_flex_ops.torch_private` says of it.

``scripts/test_private_apis`` runs these tests, and the tests marked ``private_api`` elsewhere, with
other versions of PyTorch and transformers. Written against PyTorch 2.13.
"""

import ast
import copy
import inspect
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import infllm_flex_ops
from infllm_flex_ops import torch_private

pytestmark = pytest.mark.private_api
ROOT = Path(__file__).parent.parent
OF_OBJECTS = {
    *("_version", "_cdata", "_sequence_nr", "_init_fn", "_opoverload", "_modules"),
    *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
}
FUNCTIONS = [x for x in map(torch_private.__dict__.get, torch_private.__all__) if callable(x)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_entry_says_what_it_needs_and_has_a_test(function):
    text = inspect.getdoc(function)
    for part in ("\nAPI: ", r", seen\s+in\s+\d", "\nIf it goes: ", "\nInstead: "):
        assert re.search(part, text), part
    assert f"test_{function.__name__}" in globals()


def private_names(path):
    """Private names of PyTorch in a file: after ``torch``, in its imports, or of its objects."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (name for name in names if name.startswith("_"))
        if isinstance(node, ast.Attribute) and re.match("_[a-zA-Z]", node.attr):
            text = ast.unparse(node)
            if text.startswith("torch.") or node.attr in OF_OBJECTS:
                yield text


def test_no_other_file_of_the_packages_uses_a_private_name():
    files = [x for part in ("infllm_flex", "custom_ops") for x in (ROOT / part).rglob("*.py")]
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if "torch_private" not in path.parts
        for name in private_names(path)
    }
    assert not found
    assert set(private_names(Path(inspect.getfile(torch_private.write_count)))) > {"x._version"}


# Operators and transforms.


def test_are_transforms_active():
    found = []
    torch.func.vmap(lambda x: found.append(torch_private.are_transforms_active()) or x)(
        torch.ones(2)
    )
    assert found == [True]
    assert not torch_private.are_transforms_active()


def test_below_autograd():
    x = torch.ones(2, requires_grad=True)
    with torch_private.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_forward_mode_enabled():
    x, tangent = torch.ones(2), torch.full((2,), 3.0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        with forward_ad._set_fwd_grad_enabled(False), torch_private.forward_mode_enabled():
            assert torch.equal(forward_ad.unpack_dual(dual * 2).tangent, 2 * tangent)


def _make_double():
    class Double(torch_private.single_level_function()):
        @staticmethod
        def forward(ctx, x):
            with torch_private.below_autograd():
                return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    return Double


def test_single_level_function():
    x = torch.ones(2, requires_grad=True)
    _make_double().apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_single_level_functions_allowed():
    def apply(x):
        with torch_private.single_level_functions_allowed():
            return _make_double().apply(x).sum()

    assert torch.func.grad(apply)(torch.ones(2)).tolist() == [2.0, 2.0]


def test_assert_async():
    torch_private.assert_async(torch.tensor(True), "never said")
    with pytest.raises(RuntimeError, match="said in the end"):
        torch_private.assert_async(torch.tensor(False), "said in the end")


# Compilers.


def _untraceable():
    return time.process_time() * 0 + 3.0


@torch_private.constant_to_graphs
def _constant():
    return _untraceable()


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_constant_to_graphs():
    graph = torch.compile(lambda x: x * _constant(), backend="eager", fullgraph=True)
    assert graph(torch.ones(1)).item() == 3.0
    broken = torch.compile(lambda x: x * _untraceable(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        broken(torch.ones(1))


def test_is_compiled():
    function = torch.compile(torch.sin, backend="eager")
    assert torch_private.is_compiled(function)
    assert torch_private.is_compiled(torch.compile(lambda x: x, backend="eager"))
    assert not torch_private.is_compiled(torch.sin)


def test_is_traced_otherwise():
    found = []

    def function(x):
        found.append(torch_private.is_traced_otherwise())
        return x

    torch.fx.symbolic_trace(function)
    function(torch.ones(1))
    assert found == [True, False]


def test_mark_static_address():
    x = torch.ones(1)
    torch_private.mark_static_address(x)
    assert torch.compile(lambda: x + 1, backend="aot_eager", fullgraph=True)().item() == 2.0


def test_recompile_limit():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    function = torch.compile(lambda x, n: x + n, backend=count, dynamic=False, fullgraph=True)
    with torch_private.recompile_limit(3, strict=True):
        for n in range(3):
            function(torch.ones(1), n)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            function(torch.ones(1), 3)
    assert len(graphs) == 3


def test_without_side_effect_check():
    def region(x, called):
        torch_private.without_side_effect_check(called.append, 1)
        return x.sin()

    def function(x, called):
        return checkpoint(region, x, called, use_reentrant=False)

    graph = torch.compile(function, backend="eager", fullgraph=True)
    x, called = torch.ones(2, requires_grad=True), []
    assert torch.equal(graph(x, called), x.sin())
    assert called == [1]


# Autograd.


def test_current_backward():
    found = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(torch_private.current_backward())
            return grad

    x = torch.ones(1, requires_grad=True)
    Look.apply(x).backward()
    Look.apply(x).backward()
    assert torch_private.current_backward() == -1
    assert min(found) >= 0
    assert found[0] != found[1]


def test_next_node_number():
    before = torch_private.next_node_number()
    out = torch.ones(1, requires_grad=True) * 2
    assert torch_private.next_node_number() == before + 1
    assert out.grad_fn._sequence_nr() == before


def test_current_node_number():
    found = []
    x = torch.ones(1, requires_grad=True)

    def region(y):
        found.append(torch_private.current_node_number())
        return y.sin()  # needs its input again

    first = torch_private.next_node_number()
    out = checkpoint(region, x * 2, use_reentrant=False)
    end = torch_private.next_node_number()
    out.backward()
    assert found[0] is None
    assert first <= found[1] < end  # the number of a node of the forward that is recomputed


# Tensors.


def test_is_fake():
    with torch._subclasses.FakeTensorMode():
        assert torch_private.is_fake(torch.ones(3))
    assert not torch_private.is_fake(torch.ones(3))


def test_write_count():
    x = torch.zeros(4)
    before = torch_private.write_count(x)
    x[:2].fill_(1.0)
    assert torch_private.write_count(x) == before + 1
    x.add(1.0)
    assert torch_private.write_count(x) == before + 1


def test_memory_users():
    x = torch.zeros(4)
    alone = torch_private.memory_users(x)
    view = x[:2]
    assert torch_private.memory_users(x) == alone + 1
    del view
    assert torch_private.memory_users(x) == alone


def test_parse_to():
    cpu, half = torch.device("cpu"), torch.float16
    assert torch_private.parse_to("cpu") == (cpu, None)
    assert torch_private.parse_to(half) == (None, half)
    assert torch_private.parse_to(cpu, half, non_blocking=True) == (cpu, half)
    assert torch_private.parse_to(torch.zeros(1, dtype=half)) == (cpu, half)
    assert torch_private.parse_to(device="meta") == (torch.device("meta"), None)


def test_tree_map():
    tree = {"a": (1, [2]), "b": 3}
    assert torch_private.tree_map(lambda x: x + 1, tree) == {"a": (2, [3]), "b": 4}


# Modules.


def _before(module, args, kwargs):
    return (args[0] + 1,), kwargs


def _after(module, args, kwargs, output):
    return output * 10


def _copied_module():
    """A module whose hooks have no handles."""
    module = nn.Identity()
    module.register_forward_pre_hook(_before, with_kwargs=True)
    module.register_forward_hook(_after, with_kwargs=True, always_call=True)
    return copy.deepcopy(module)


def test_forward_pre_hooks():
    assert torch_private.forward_pre_hooks(_copied_module()) == [_before]
    assert torch_private.forward_pre_hooks(nn.Identity()) == []


def test_forward_hooks():
    assert torch_private.forward_hooks(_copied_module()) == [_after]
    assert torch_private.forward_hooks(nn.Identity()) == []


def test_code_that_calls():
    codes = []

    def keep(module, _):
        codes.append(torch_private.code_that_calls(module, inspect.currentframe().f_back))

    module = nn.Identity()
    module.register_forward_pre_hook(keep)
    module(1)
    keep(module, None)
    assert inspect.iscode(codes[0])
    assert codes[1] is None  # not called by a module


def test_is_being_called():
    found = []

    def keep(module, _):
        frame = inspect.currentframe().f_back
        code = torch_private.code_that_calls(module, frame)
        found.append((code, torch_private.is_being_called(module, code, frame)))
        found.append((code, torch_private.is_being_called(module, code, frame.f_back)))

    module = nn.Identity()
    module.register_forward_pre_hook(keep)
    nn.Sequential(module)(1)
    assert [called for _, called in found] == [True, False]
    assert not torch_private.is_being_called(module, found[0][0], inspect.currentframe())


def test_remove_forward_pre_hooks():
    module, x = _copied_module(), torch.ones(1)
    assert module(x).item() == 20.0
    torch_private.remove_forward_pre_hooks(module, lambda hook: hook is _after)
    assert module(x).item() == 20.0
    torch_private.remove_forward_pre_hooks(module, lambda hook: hook is _before)
    assert module(x).item() == 10.0
    assert vars(module) == {**vars(module), **_hooks_of(nn.Identity(), "pre")}


def test_remove_forward_hooks():
    module, x = _copied_module(), torch.ones(1)
    torch_private.remove_forward_hooks(module, lambda hook: hook is _after)
    assert module(x).item() == 2.0
    assert vars(module) == {**vars(module), **_hooks_of(nn.Identity(), "forward_hooks")}


def _hooks_of(module, part):
    return {name: value for name, value in vars(module).items() if part in name}


def test_replace_child():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    copied, child, kept = copy.copy(model), nn.Identity(), model[0]
    torch_private.replace_child(copied, "0", child)
    assert copied[0] is child
    assert model[0] is kept


# FlexAttention.


def _lists():
    selected = torch.tensor([[0, -1]] * 32 + [[0, 1]] * 32, dtype=torch.int32).view(1, 1, 64, 2)
    num, idx, _, full_num, full_idx = infllm_flex_ops.tile_blocks(selected, 64, 32, 32, 2)
    return (num, idx), (full_num, full_idx)


def test_block_mask():
    from torch.nn.attention.flex_attention import flex_attention

    partial, full = _lists()
    mask = torch_private.block_mask(
        (64, 64), (32, 32), lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, kv=partial, full_kv=full
    )
    assert mask.BLOCK_SIZE == (32, 32)
    assert mask.seq_lengths == (64, 64)
    q, k, v = torch.randn(3, 1, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        found = flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_flex_options():
    """The kernels' templates still read the options; only a GPU tells whether they obey them."""
    from pathlib import Path

    import torch._inductor.kernel.flex as flex

    options = torch_private.flex_options(True, (32, 64))
    assert options["SPARSE_Q_BLOCK_SIZE"] == 32
    assert options["SPARSE_KV_BLOCK_SIZE"] == 64
    folder = Path(flex.__file__).parent
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".jinja")]
    text = "".join(path.read_text() for path in files)
    for name in options:
        assert name in text
