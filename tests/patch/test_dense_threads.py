"""`dense` holds for the thread that opens it; what is recomputed attends as in its forward."""

import contextlib
import threading

import pytest
import torch
from transformers import LlamaForCausalLM

import infllm_flex as ifx
from tests.patch.models import LONG, SETTINGS, build, enable_checkpointing, logits, tokens
from tests.patch.plain_models import plain_model

INSIDE, OUTSIDE = True, False


def default_device():
    """Set this thread's default device in other threads, which have their own."""
    device = torch.get_default_device()
    # A device context is a mode, which Dynamo guards, so there is none for the CPU.
    return contextlib.nullcontext() if device.type == "cpu" else device


def in_thread(function):
    """The result of a function in another thread, or its exception."""
    results = []
    device = default_device()

    def run():
        try:
            with device:
                results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def block(model, opens):
    return ifx.dense(model) if opens else contextlib.nullcontext()


class TestThreads:
    def test_another_thread_stays_sparse(self):
        model = ifx.patch_model(build(), SETTINGS)
        sparse = logits(model, LONG)
        with ifx.dense(model):
            assert torch.equal(in_thread(lambda: logits(model, LONG)), sparse)
            assert in_thread(lambda: all(row.sparse for row in ifx.describe(model)))
            assert torch.equal(logits(model, LONG), logits(build(), LONG))

    def test_a_block_of_another_thread_makes_nothing_dense_here(self):
        model = ifx.patch_model(plain_model(), SETTINGS)
        sparse = model(tokens(LONG))
        plain = plain_model()(tokens(LONG))
        opened, done = threading.Event(), threading.Event()
        device = default_device()

        def elsewhere():
            with device, ifx.dense(model):
                opened.set()
                done.wait(60)
                return model(tokens(LONG))

        outputs = []
        thread = threading.Thread(target=lambda: outputs.append(elsewhere()))
        thread.start()
        opened.wait(60)
        assert torch.equal(model(tokens(LONG)), sparse)
        done.set()
        thread.join()
        assert torch.equal(outputs[0], plain)
        assert torch.equal(model(tokens(LONG)), sparse)

    @pytest.mark.parametrize("make", [build, plain_model], ids=["transformers", "by hand"])
    def test_compiled(self, make):
        torch.compiler.reset()
        model = make()

        def out(function):
            with torch.no_grad():
                result = function(tokens(LONG))
            return getattr(result, "logits", result)

        plain = out(model)
        ifx.patch_model(model, SETTINGS)
        sparse = out(model)
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph

        function = torch.compile(model, fullgraph=True, backend=count)
        close = {"rtol": 1e-3, "atol": 2e-5}
        for _ in range(2):
            torch.testing.assert_close(out(function), sparse, **close)
            with ifx.dense(model):
                torch.testing.assert_close(out(function), plain, **close)
                torch.testing.assert_close(in_thread(lambda: out(function)), sparse, **close)
            torch.testing.assert_close(out(function), sparse, **close)
        assert len(graphs) == 2
        torch.compiler.reset()


def hugging(**how):
    model = build().train()
    if how:
        enable_checkpointing(model, **how)
    return model


def by_hand(**how):
    torch.manual_seed(0)
    model = plain_model()
    model.checkpointing = how
    return model


def loss_of(model, **kwargs):
    x = tokens(LONG)
    if isinstance(model, LlamaForCausalLM):
        return model(x, labels=x, use_cache=False, **kwargs).loss
    return model(x).logsumexp(-1).square().mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def expected(make):
    """The gradients of dense and of sparse attention, without a checkpoint."""
    model = ifx.patch_model(make(), SETTINGS)
    sparse = gradients(model, loss_of(model))
    with ifx.dense(model):
        dense = gradients(model, loss_of(model))
    differences = [(a - b).abs().max() for a, b in zip(dense, sparse, strict=True)]
    assert max(differences) > 1e-4
    return {INSIDE: dense, OUTSIDE: sparse}


KINDS = {"reentrant": {"use_reentrant": True}, "not": {"use_reentrant": False}}


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("make", [hugging, by_hand], ids=["transformers", "by hand"])
class TestCheckpoints:
    def model(self, make, how):
        model = ifx.patch_model(make(**how), SETTINGS)
        if how["use_reentrant"] and isinstance(model, LlamaForCausalLM):
            model.enable_input_require_grads()
        return model

    @pytest.mark.parametrize("there", [INSIDE, OUTSIDE], ids=["in a block", "outside"])
    @pytest.mark.parametrize("here", [INSIDE, OUTSIDE], ids=["dense", "sparse"])
    def test_it_recomputes_what_its_forward_did(self, make, how, here, there):
        model = self.model(make, how)
        with block(model, here):
            loss = loss_of(model)
        with block(model, there):
            ours = gradients(model, loss)
        assert_close(ours, expected(make)[here])

    @pytest.mark.parametrize("here", [INSIDE, OUTSIDE], ids=["dense", "sparse"])
    def test_in_the_backward_pass_of_another_thread(self, make, how, here):
        model = self.model(make, how)
        with block(model, here):
            loss = loss_of(model)
            ours = in_thread(lambda: gradients(model, loss))
        assert_close(ours, expected(make)[here])
        if here is OUTSIDE:
            loss = loss_of(model)
            with ifx.dense(model):
                assert_close(in_thread(lambda: gradients(model, loss)), expected(make)[OUTSIDE])

    def test_forwards_of_both_kinds_in_one_backward_pass(self, make, how):
        model = self.model(make, how)
        first = loss_of(model)
        with ifx.dense(model):
            second = loss_of(model)
        third = loss_of(model)
        ours = gradients(model, first + 2 * second + third)
        theirs = expected(make)
        both = [2 * a + 2 * b for a, b in zip(theirs[INSIDE], theirs[OUTSIDE], strict=True)]
        assert_close(ours, both)


def assert_close(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_two_threads_train_one_model_at_once(how):
    """Each thread makes a graph and runs its backward; both number their nodes from zero."""
    model = ifx.patch_model(by_hand(**how), SETTINGS)
    theirs = expected(by_hand)
    made, results = threading.Barrier(2), {}
    turns, device = threading.Lock(), default_device()

    def train(kind):
        with device, block(model, kind):
            loss = loss_of(model)
            made.wait(60)
            with turns:
                results[kind] = gradients(model, loss)

    threads = [threading.Thread(target=train, args=(kind,)) for kind in (INSIDE, OUTSIDE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kind in (INSIDE, OUTSIDE):
        assert_close(results[kind], theirs[kind])


def test_a_block_opened_in_a_backward_pass_counts_there():
    model = ifx.patch_model(build(), SETTINGS)
    plain, seen = logits(build(), LONG), []
    x = torch.ones(1, requires_grad=True)
    device = default_device()

    def hook(_):
        with device:
            with ifx.dense(model):
                seen.append(logits(model, LONG))
            seen.append(logits(model, LONG))

    y = x * 2
    y.register_hook(hook)
    with ifx.dense(model):
        y.backward()
    sparse = logits(model, LONG)
    assert torch.equal(seen[0], plain)
    assert torch.equal(seen[1], sparse)
