"""Every operator is registered completely, and its definition can be called past the dispatcher."""

import inspect
from importlib.util import find_spec

import pytest
import torch

import infllm_flex_ops
from infllm_flex_ops.dispatch import (
    define_operator,
    direct_kernel,
    skip_dispatcher,
    without_autocast,
    without_grad,
)
from infllm_flex_ops.selection.rule import SelectionRule

OPERATORS = [getattr(infllm_flex_ops, name) for name in infllm_flex_ops.__all__]
WITHOUT_A_KERNEL = ["assert_async"]


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.plain.__name__)
def test_an_operator_has_the_name_of_its_definition(op):
    overload = getattr(torch.ops.infllm_flex, op.plain.__name__).default
    arguments = [argument.name for argument in overload._schema.arguments]
    assert arguments == list(inspect.signature(op.plain).parameters)


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.plain.__name__)
def test_the_launcher_takes_the_arguments_of_the_operator(op):
    name = op.plain.__name__
    assert hasattr(op, "launcher") == (name not in WITHOUT_A_KERNEL)
    if name not in WITHOUT_A_KERNEL:
        parameters = inspect.signature(op.plain).parameters
        expected = list(parameters)
        if op.pack is not None:
            expected = ["rule" if isinstance(x, SelectionRule) else x for x in op.pack(*expected)]
        found = inspect.signature(op.launcher()).parameters
        assert list(found) == expected
        for argument in set(found) & set(parameters):
            assert found[argument].default == parameters[argument].default


@pytest.mark.parametrize("name", ["compress_keys", "select_blocks", "attend_blocks"])
def test_float64_is_refused_on_a_gpu(name):
    with pytest.raises(NotImplementedError, match="no float64 on a GPU: cast to float32"):
        getattr(infllm_flex_ops, name).on_cuda(torch.ones(1, 1, 32, 4, dtype=torch.float64))


def test_a_definition_is_called_directly_only_where_the_dispatcher_adds_nothing():
    op, x = infllm_flex_ops.compress_keys, torch.ones(1, 1, 32, 4)
    assert skip_dispatcher(op, x) is op
    with torch.no_grad():
        assert skip_dispatcher(op, x) is op.plain
        assert skip_dispatcher(op, torch.nn.Parameter(x)) is op
        assert skip_dispatcher(op, x.to("meta")) is op
        found = []
        torch.func.vmap(lambda y: found.append(skip_dispatcher(op, y)) or y)(x)
    assert found == [op]


def test_a_kernel_is_called_directly_on_the_current_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    op, without_kernel = infllm_flex_ops.compress_keys, infllm_flex_ops.assert_async
    assert direct_kernel(op, torch.device("cuda", 1)) is op.on_cuda
    assert direct_kernel(op, torch.device("cuda", 0)) is op  # the dispatcher may switch devices
    assert direct_kernel(op, torch.device("meta")) is op
    assert direct_kernel(without_kernel, torch.device("cuda", 1)) is without_kernel


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_off_inside(enabled):
    @without_grad
    def ask(factor, *, offset):
        return torch.is_grad_enabled(), factor + offset

    with torch.set_grad_enabled(enabled):
        assert ask(1, offset=2) == (False, 3)
        assert torch.is_grad_enabled() == enabled


def test_a_definition_is_computed_in_its_own_precision_inside_autocast():
    @without_autocast
    def multiply(x, y):
        return x @ y

    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert multiply(x, y=x).dtype == torch.float32
    assert torch.equal(multiply(x, x), x @ x)


def test_an_operator_may_write_to_its_arguments():
    @define_operator(mutates_args=("x",))
    def fill_for_a_test(x: torch.Tensor, value: float) -> None:
        x.fill_(value)

    x = torch.zeros(3)
    fill_for_a_test(x, 2.0)
    assert x.tolist() == [2.0, 2.0, 2.0]
    assert torch.ops.infllm_flex.fill_for_a_test.default._schema.is_mutable
