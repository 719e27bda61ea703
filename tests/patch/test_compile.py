"""A patched model compiles as one graph, forward and backward; the graph asserts its inputs."""

import pytest
import torch

import infllm_flex as ifx
from infllm_flex.patch.forward_context import ForwardContext
from infllm_flex.patch.running_forward import current_forward, set_current_forward
from tests.patch.models import (
    CONFIGS,
    LONG,
    SETTINGS,
    SHORT,
    build,
    enable_checkpointing,
    logits,
    loss_and_gradients,
    tokens,
)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_one_graph_forward_and_backward(length):
    model = ifx.patch_model(build(), SETTINGS)
    eager = loss_and_gradients(model, length)
    for ours, theirs in zip(loss_and_gradients(compiled(model), length), eager, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("padding", [0, 30])
def test_one_graph_below_dense_len_with_checkpointed_layers(padding):
    model = ifx.patch_model(build(one_layer()), SETTINGS)
    mask = torch.ones_like(tokens(SHORT))
    mask[0, :padding] = 0
    eager = loss_and_gradients(model, SHORT, attention_mask=mask)
    enable_checkpointing(model)
    ours = loss_and_gradients(compiled(model), SHORT, attention_mask=mask)
    for our, their in zip(ours, eager, strict=True):
        assert_close(our, their)


@pytest.mark.private_api
def test_through_inductor():
    model = ifx.patch_model(build(one_layer()), SETTINGS)
    function = compiled(model, "inductor")
    positions = torch.arange(LONG).repeat(2, 1)
    ours = logits(function, LONG, position_ids=positions, use_cache=False)
    assert_close(ours, logits(model, LONG))
    packed = positions % 40
    ours = logits(function, LONG, position_ids=packed, use_cache=False)
    assert_close(ours, logits(model, LONG, position_ids=packed))
    # The same graph raises an error; Inductor's own assertion would end the process.
    with pytest.raises(RuntimeError, match="pass the bounds of the documents as cu_seq_lens_q"):
        logits(function, LONG, position_ids=positions % 2, use_cache=False)


@pytest.mark.slow
def test_training_through_inductor():
    model = ifx.patch_model(build(), SETTINGS)
    eager = loss_and_gradients(model, LONG)
    ours = loss_and_gradients(compiled(model, "inductor"), LONG)
    for our, their in zip(ours, eager, strict=True):
        assert_close(our, their)


def test_settings_changed_after_compiling_take_effect():
    model = build()
    plain = logits(model, LONG)
    function = compiled(model)
    torch.testing.assert_close(logits(function, LONG), plain)
    ifx.patch_model(model, SETTINGS)
    sparse = logits(model, LONG)
    assert_close(logits(function, LONG), sparse)
    with ifx.dense(model):
        torch.testing.assert_close(logits(function, LONG), plain)
    ifx.unpatch_model(model)
    torch.testing.assert_close(logits(function, LONG), plain)


def test_a_mask_of_ones_is_plain_causal():
    model = ifx.patch_model(build(), SETTINGS)
    ones = torch.ones_like(tokens(LONG))
    ours = logits(compiled(model), LONG, attention_mask=ones)
    assert_close(ours, logits(model, LONG))


def test_a_mask_of_ones_own_raises_at_run_time():
    function = compiled(ifx.patch_model(build(), SETTINGS))
    causal = torch.ones(2, 1, LONG, LONG).tril().bool()
    prefix = causal.clone()
    prefix[..., :9] = True
    logits(function, LONG, attention_mask=causal)
    with pytest.raises(RuntimeError, match="cannot serve an attention mask beyond causal"):
        logits(function, LONG, attention_mask=prefix)


def test_a_model_built_with_the_implementation():
    config = one_layer()
    config.sparse_config = SETTINGS
    model = build(config, attn_implementation="infllm_flex")
    with pytest.raises(RuntimeError, match=r"call infllm_flex\.patch_model\(model\) before"):
        logits(compiled(model), LONG)
    in_pieces = logits(torch.compile(model, backend="aot_eager"), LONG)
    assert_close(in_pieces, logits(model, LONG))
    assert_close(logits(compiled(model), LONG), in_pieces)


def test_a_forward_is_known_after_a_graph_break():
    class Breaks(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            forward = current_forward()
            return x + (forward is not None and forward.positions is not None)

    module, positions = Breaks(), torch.arange(4)[None]

    @torch.compile(backend="eager")
    def run(x):
        set_current_forward(ForwardContext(module, current_forward(), positions))
        out = module(x * 1)
        set_current_forward(None)
        return out

    assert run(torch.zeros(1)) == 1
    assert current_forward() is None


def one_layer():
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    return config


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
