"""A forward that a KeyboardInterrupt ends leaves nothing to the forwards after it."""

import gc
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache

import infllm_flex as ifx
from infllm_flex.patch.running_forward import current_forward, set_current_forward
from tests.patch.models import CACHE, SETTINGS, build, tokens

S = 150
IDS = tokens(S, 1)
DOCUMENTS = torch.cat([torch.arange(n) for n in (70, 55, 25)])[None]
BOUNDS = torch.tensor([0, 70, 125, S], dtype=torch.int32)
GIVEN = {
    "positions": {"position_ids": DOCUMENTS, "use_cache": False},
    "bounds": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "use_cache": False},
}


@pytest.fixture(autouse=True)
def _no_forward():
    set_current_forward(None)
    yield
    set_current_forward(None)


def patched(**options):
    return ifx.patch_model(build(), SETTINGS, **options).requires_grad_(False)


def interrupt(model, error=KeyboardInterrupt, **given):
    def stop(*_):
        raise error

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(IDS, **given)
    handle.remove()


def built_with_our_name():
    config = build().config
    config.sparse_config = SETTINGS
    model = build(config, attn_implementation="infllm_flex").requires_grad_(False)
    model(IDS, use_cache=False)
    return model


NEXT = {
    "the same model": lambda model: model(IDS, use_cache=False).logits,
    "another model": lambda _: patched()(IDS, use_cache=False).logits,
    "its base": lambda model: model.lm_head(model.model(IDS, use_cache=False).last_hidden_state),
    "within its method": lambda model: model.generate(
        IDS, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, do_sample=False
    ).logits[0],
    "no hooks": lambda _: built_with_our_name()(IDS, use_cache=False).logits,
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("then", NEXT)
def test_the_next_forward_inherits_nothing(given, then, error):
    model = patched()
    expected = NEXT[then](model)
    interrupt(model, error, **GIVEN[given])
    assert torch.equal(NEXT[then](model), expected)
    # One without hooks has no hook that could take the ended forward out of its thread.
    assert current_forward() is None


def test_no_forward_is_left_after_many_interrupts():
    model = patched()
    for _ in range(3):
        interrupt(model, **GIVEN["positions"])
    model(IDS[:, :9])
    assert current_forward() is None


def test_an_interrupted_forward_keeps_no_model_and_no_cache():
    model, cache = patched(), DynamicCache()
    interrupt(model, **{CACHE: cache})
    alive = weakref.ref(model), weakref.ref(cache)
    del model, cache
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("given", GIVEN)
def test_a_compiled_forward_inherits_nothing(given):
    model = patched()
    expected = model(IDS, use_cache=False).logits
    interrupt(model, **GIVEN[given])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS, use_cache=False).logits, expected)
    set_current_forward(None)
    torch.compiler.reset()


def test_an_interrupted_graph_leaves_nothing():
    model = patched()
    expected = model(IDS, use_cache=False).logits

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(torch.compiler.disable(stop))
    with pytest.raises(KeyboardInterrupt):
        torch.compile(model, backend="eager")(IDS, **GIVEN["positions"])
    handle.remove()
    for function in (model, patched(), torch.compile(model, backend="eager")):
        assert torch.equal(function(IDS, use_cache=False).logits, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_within_a_forward_ends_alone(compiled):
    """A teacher that a hook calls is no part of the model, whose documents stay known."""
    model, teacher = patched(), patched()
    expected = model(IDS, **GIVEN["positions"]).logits
    if compiled:
        teacher.compile(backend="eager")
    ids, calls = tokens(S - 20, 1), []

    def call(*_):
        calls.append(teacher(ids).logits)

    model.model.layers[0].register_forward_hook(call)
    assert torch.equal(model(IDS, **GIVEN["positions"]).logits, expected)
    assert torch.equal(calls[0], patched()(ids).logits)
    assert current_forward() is None
    torch.compiler.reset()


def test_an_interrupt_inside_a_forward_that_goes_on():
    model, other = patched(), patched()
    expected = model(IDS, **GIVEN["positions"]).logits
    model.model.layers[0].register_forward_hook(lambda *_: interrupt(other, **GIVEN["bounds"]))
    assert torch.equal(model(IDS, **GIVEN["positions"]).logits, expected)
    assert current_forward() is None


def test_a_thread_knows_no_interrupt_of_another():
    model = patched()
    interrupt(model, **GIVEN["positions"])
    thread = threading.Thread(target=lambda: model(IDS))
    left = current_forward()
    thread.start()
    thread.join()
    assert current_forward() is left
