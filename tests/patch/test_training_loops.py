"""Patched models in training loops: checkpoints, accumulation, lower precision, export."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import infllm_flex as ifx
import infllm_flex_ops
from tests.patch.library_models import LIBRARY_MODELS
from tests.patch.models import LONG, SETTINGS, SHORT, build, equal, loss_and_gradients, tokens
from tests.patch.plain_models import plain_model
from tests.patch.test_sdpa_adapter import assert_close, run

SELECT = torch.ops.infllm_flex.select_blocks.default
ATTEND = torch.ops.infllm_flex.attend_blocks.default


def save_selection(context, op, *args, **kwargs):
    """A policy that saves the selected blocks, which are small and costly to recompute."""
    return CheckpointPolicy.MUST_SAVE if op is SELECT else CheckpointPolicy.PREFER_RECOMPUTE


KINDS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, save_selection),
    },
}
MODELS = {"F.scaled_dot_product_attention": "fused", **LIBRARY_MODELS}


class CountSelections(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is SELECT
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", MODELS.values(), ids=MODELS)
def test_checkpointing_gives_the_same_gradients(style, kind):
    model = ifx.patch_model(plain_model(style), SETTINGS)
    plain = run(model, LONG)
    model.checkpointing = KINDS[kind]
    assert equal(run(model, LONG), plain)


@pytest.mark.parametrize(("kind", "times"), {**dict.fromkeys(KINDS, 2), "selective": 1}.items())
def test_the_selection_is_made_again_or_saved(kind, times):
    model = ifx.patch_model(plain_model(), SETTINGS)
    model.checkpointing = KINDS[kind]
    with CountSelections() as selections:
        run(model, LONG)
    assert selections.count == times * len(model.h)


def first_alone(selected):
    """Another selection of blocks: the first ones."""
    return torch.where(torch.arange(selected.shape[-1]) == 0, selected, -1)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_a_selection_made_again_differently_would_show(kind, monkeypatch):
    model = ifx.patch_model(plain_model(), SETTINGS)
    plain = run(model, LONG)
    model.checkpointing = KINDS[kind]
    calls = []

    def unsteady(*args, **kwargs):
        calls.append(args)
        selected = select(*args, **kwargs)
        again = len(calls) > len(model.h)
        # The first block and the token's own: another valid selection.
        return (
            torch.cat([selected[..., :1], torch.full_like(selected[..., 1:], -1)], -1)
            if again
            else selected
        )

    select = infllm_flex_ops.select_blocks
    monkeypatch.setattr(infllm_flex_ops, "select_blocks", unsteady)
    out, *gradients = run(model, LONG)
    assert torch.equal(out, plain[0])
    assert not equal(gradients, plain[1:])


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = ifx.patch_model(plain_model(), SETTINGS)
    batch = tokens(LONG, batch=4)
    whole = gradients_of(model, [batch])
    assert_close(gradients_of(model, batch.split(1)), whole)


def gradients_of(model, parts):
    model.zero_grad()
    for part in parts:
        loss = F.cross_entropy(model(part).flatten(0, 1), part.flatten())
        (loss / len(parts)).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("style", ["fused", "repeated"])
def test_autocast(style):
    # The second model's rotary embedding returns float32 queries and keys; values are bfloat16.
    model = ifx.patch_model(plain_model(style), SETTINGS)
    exact = run(model, LONG)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(model, LONG)
    with torch.autocast("cpu", torch.bfloat16), ifx.dense(model):
        dense = run(model, LONG)
    assert all(x.dtype == torch.float32 for x in ours[1:])
    assert distance(ours, exact) < 0.5 * distance(ours, dense)


def distance(ours, theirs):
    return max(
        float((a.float() - b.float()).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)
    )


def test_autocast_of_a_transformers_model():
    model = ifx.patch_model(build(), SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss_and_gradients(model, LONG)
    torch.testing.assert_close(losses[0], loss_and_gradients(model, LONG)[0], rtol=0.05, atol=0)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [plain_model, build], ids=["generic", "transformers"])
def test_export_of_a_fixed_length(make, strict):
    model = ifx.patch_model(make(), SETTINGS)
    kwargs = {} if make is plain_model else {"use_cache": False, "return_dict": False}
    for length in (SHORT, LONG):
        program = torch.export.export(model, (tokens(length),), kwargs, strict=strict)
        ours = program.module()(tokens(length), **kwargs)
        theirs = model(tokens(length), **kwargs)
        assert_close([ours[0]], [theirs[0]])
        targets = {node.target for node in program.graph.nodes}
        assert (ATTEND in targets) == (length == LONG)
