"""Tests of which engine serves a call; fake tensors stand for a GPU."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from infllm_flex import infllm_attention
from infllm_flex.engines.choose import choose_engine
from infllm_flex.engines.flex import FlexInLevels, FlexOnCpu, FlexUnderOneMask
from infllm_flex.engines.fused import FusedEngine
from tests.inputs import make_qkv, small_config


def on_a_gpu(groups, *, Hkv=2, requires_grad=False, dtype=torch.float32):
    with FakeTensorMode():
        return [
            torch.empty(1, heads, 64, 16, dtype=dtype, device="cuda", requires_grad=requires_grad)
            for heads in (groups * Hkv, Hkv, Hkv)
        ]


def engine_of(qkv, alignment=None, **settings):
    return choose_engine(*qkv, small_config(**settings), 0.25, alignment)


@pytest.mark.parametrize("engine", ["auto", "flex"])
def test_on_the_cpu_flex_serves_inference_alone(engine):
    qkv = make_qkv(64)
    assert isinstance(engine_of(qkv, engine=engine), FlexOnCpu)
    assert engine_of(qkv, engine="fused") == FusedEngine(16, 0.25, 2)
    assert isinstance(engine_of([x.double() for x in qkv], engine=engine), FusedEngine)
    leaves = [x.clone().requires_grad_() for x in qkv]
    assert isinstance(engine_of(leaves, engine=engine), FusedEngine)
    with torch.no_grad():
        assert isinstance(engine_of(leaves, engine=engine), FlexOnCpu)


@pytest.mark.parametrize("engine", ["auto", "flex"])
@pytest.mark.parametrize(
    ("block_size", "flex"), [(8, 0), (24, 0), (40, 0), (4, 1), (12, 1), (16, 1)]
)
def test_block_sizes_that_flex_gets_wrong_without_avx_512_go_to_the_fused_engine(
    engine, block_size, flex
):
    sizes = {"block_size": block_size, "window_size": block_size, "kernel_size": 4}
    chosen = engine_of(make_qkv(64), engine=engine, **sizes, kernel_stride=4)
    assert isinstance(chosen, FlexOnCpu if flex else FusedEngine)


@pytest.mark.parametrize("block_size", [8, 12, 24, 64])
def test_on_any_cpu_the_default_engine_gives_what_the_other_gives(block_size):
    sizes = {"block_size": block_size, "window_size": block_size, "kernel_size": 4, "topk": 2}
    config = small_config(**sizes, kernel_stride=4)
    qkv = make_qkv(200)
    expected = infllm_attention(*qkv, replace(config, engine="fused"))
    torch.testing.assert_close(infllm_attention(*qkv, config), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_goes_to_the_fused_engine(which, poison):
    qkv = make_qkv(64)
    qkv[which][0, 0, 5, 3] = poison
    assert isinstance(engine_of(qkv), FusedEngine)


def test_the_fused_engine_gets_the_alignment_of_a_layout():
    assert engine_of(make_qkv(64), 48, engine="fused") == FusedEngine(16, 0.25, 2, 48)


def test_a_gpu_takes_flex_only_if_asked():
    qkv = on_a_gpu(8)
    assert isinstance(engine_of(qkv, engine="auto"), FusedEngine)
    assert isinstance(engine_of(qkv, engine="flex"), FlexInLevels)
    assert isinstance(engine_of(on_a_gpu(2), engine="flex"), FlexUnderOneMask)
    double = on_a_gpu(8, dtype=torch.float64)
    assert isinstance(engine_of(double, engine="flex"), FusedEngine)


def test_training_on_a_gpu_needs_groups_that_fill_tensor_cores():
    training = engine_of(on_a_gpu(4, requires_grad=True), engine="flex")
    assert isinstance(training, FlexInLevels)
    assert training.training
    assert all(level.rows >= 16 for level in training.levels if level.tokens == 1)
    assert not engine_of(on_a_gpu(4), engine="flex").training


def test_flex_that_cannot_train_these_shapes_says_so_once():
    qkv = on_a_gpu(2, requires_grad=True)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(2):
            assert isinstance(engine_of(qkv, engine="flex"), FusedEngine)
    (warning,) = shown
    assert "cannot train these shapes" in str(warning.message)
    assert "attend_blocks" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine_of(qkv, engine="auto")
        engine_of(on_a_gpu(2), engine="flex")
        engine_of(on_a_gpu(4, requires_grad=True), engine="flex")


@pytest.mark.parametrize("engine", ["flex", "fused"])
def test_lists_are_built_in_one_step_and_attended_in_another(engine):
    """The lists serve any queries, keys and values of the same shapes."""
    from infllm_flex import infllm_attention, select_blocks

    config, (q, k, v) = small_config(engine=engine), make_qkv(205, Hq=8)
    selected = select_blocks(q, k, config)
    chosen = choose_engine(q, k, v, config, 0.25)
    lists = chosen.build_lists(selected, k)
    for x in ((q, k, v), make_qkv(205, Hq=8, seed=1)):
        expected = infllm_attention(*x, config, selected=selected)
        assert torch.equal(chosen.attend(*x, lists), expected)
