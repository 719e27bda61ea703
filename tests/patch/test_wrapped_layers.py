"""Modules around patched layers that pass attributes on, and copies of the layers beside them."""

import copy

import pytest
import torch
from torch import nn

import infllm_flex as ifx
from tests.patch.models import LONG, SETTINGS, build, logits, tokens
from tests.patch.plain_models import plain_model


class Adapted(nn.Module):
    """Keeps a layer, and trains a copy of it, as peft does for ``modules_to_save``."""

    def __init__(self, layer):
        super().__init__()
        self.original = layer
        self.trained = copy.deepcopy(layer)

    def forward(self, *args, **kwargs):
        return self.trained(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.trained, name)


def compiled(layer):
    return torch.compile(layer, backend="eager")


def wrap_plain(model, wrap):
    for block in model.h:
        block.attn = wrap(block.attn)
    return model


def wrap_transformers(model, wrap):
    for layer in model.model.layers:
        layer.self_attn = wrap(layer.self_attn)
    return model


def plain_output(model):
    with torch.no_grad():
        return model(tokens(LONG))


MODELS = {
    "transformers": (build, wrap_transformers, lambda model: logits(model, LONG)),
    "generic": (plain_model, wrap_plain, plain_output),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("wrap", [Adapted, compiled])
@pytest.mark.parametrize("patched_first", [True, False])
def test_a_wrapper_is_no_layer_and_undoing_leaves_nothing(case, wrap, patched_first):
    torch.compiler.reset()
    make, put_around, call = case
    dense, sparse = call(make()), call(ifx.patch_model(make(), SETTINGS))
    model = make()
    if patched_first:
        ifx.patch_model(model, SETTINGS)
    put_around(model, wrap)
    if not patched_first:
        ifx.patch_model(model, SETTINGS)
    rows = ifx.describe(model)
    assert len(rows) == (4 if wrap is Adapted else 2)
    assert all(row.sparse for row in rows)
    assert torch.equal(call(model), sparse)
    ifx.unpatch_model(model)
    assert torch.equal(call(model), dense)
    traces = [x for m in model.modules() for x in (m, *vars(m)) if "infllm" in str(x)]
    assert not traces
    assert not any("infllm" in str(getattr(m, "config", "")) for m in model.modules())
    assert not any(row.sparse for row in ifx.describe(model))
