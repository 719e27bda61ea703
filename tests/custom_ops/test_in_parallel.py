"""Parts of a definition on several threads: same bits, order kept, errors raised, forks too."""

import os
import threading
import warnings

import pytest
import torch

from infllm_flex import InfLLMConfig, infllm_attention
from infllm_flex_ops import attend_blocks
from infllm_flex_ops.block_attention import tile_chunks
from infllm_flex_ops.in_parallel import in_parallel
from tests.inputs import make_qkv, make_selected, small_config


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_each_part_runs_on_one_thread_and_the_caller_keeps_its_own(threads):
    seen = []
    in_parallel(
        lambda part: (torch.get_num_threads(), threading.get_ident()), range(40), seen.append
    )
    assert {number for number, _ in seen} == {1}
    assert len(seen) == 40
    assert torch.get_num_threads() == threads
    assert (threading.get_ident() in {ident for _, ident in seen}) == (threads == 1)


def test_results_are_finished_one_by_one_in_the_order_of_the_parts(threads):
    turns, inside, seen = threading.Event(), threading.Lock(), []

    def wait_for_the_second(part):
        if part == 1:
            turns.set()
        if part == 0 and threads > 1:
            assert turns.wait(30)
        return part

    def note(part):
        assert inside.acquire(blocking=False)
        seen.append(part)
        inside.release()

    in_parallel(wait_for_the_second, range(30), note)
    assert seen == list(range(30))


def test_an_error_in_a_part_is_raised_and_the_threads_go_on(threads):
    def fail(part):
        if part == 7:
            raise ZeroDivisionError("part 7")

    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="part 7"):
            in_parallel(fail, range(50), lambda nothing: None)
    seen = []
    in_parallel(lambda part: part, range(3), seen.append)
    assert seen == [0, 1, 2]


def gradients():
    qkv = [x.requires_grad_() for x in make_qkv(700, B=2, Hq=6, Hkv=2)]
    out = infllm_attention(*qkv, small_config(engine="fused"))
    return [out, *torch.autograd.grad(out.square().sum(), qkv)]


def test_bits_of_attention_and_its_gradients_do_not_depend_on_threads(threads, monkeypatch):
    monkeypatch.setattr(tile_chunks, "CHUNK_SCORES", 50_000)
    found = gradients()
    torch.set_num_threads(1)
    for one, right in zip(found, gradients(), strict=True):
        assert torch.equal(one, right)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_modes_of_the_caller_hold(threads, mode):
    with mode():
        q, k, v = make_qkv(205)
        out, _ = attend_blocks(q, k, v, make_selected(205), 16, 0.25)
        assert out.is_inference() == (mode is torch.inference_mode)
        infllm_attention(q, k, v, InfLLMConfig(dense_len=0, engine="fused"))


def test_a_forked_process_makes_threads_of_its_own(threads):
    in_parallel(abs, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of forks with threads
        child = os.fork()
    if child == 0:
        seen = []
        in_parallel(abs, range(-3, 3), seen.append)
        os._exit(0 if seen == [3, 2, 1, 0, 1, 2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
