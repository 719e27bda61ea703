"""Stages are timed separately, compiled, and in rotation."""

from __future__ import annotations

import pytest
import torch

import infllm_flex_ops
from benchmarking.dense import _dense_flex
from benchmarking.inputs import QKV
from benchmarking.stages import engine_steps
from benchmarking.timing import Limits, Subject, in_turn, time_in_rotation
from infllm_flex import infllm_attention, select_blocks
from infllm_flex_ops.block_lists import union_lists
from tests.inputs import make_qkv as draw_qkv
from tests.inputs import small_config


@pytest.mark.parametrize("engine", ["flex", "fused"])
def test_lists_are_built_apart_from_the_attention_over_them(engine, monkeypatch):
    config, qkv = small_config(engine=engine), QKV(*draw_qkv(200, Hq=8))
    selected = select_blocks(*qkv[:2], config)
    steps = engine_steps(qkv, selected, config)
    expected = infllm_attention(*qkv, config, selected=selected)
    steps.build_lists()
    monkeypatch.setattr(union_lists, "list_blocks", None)  # neither step calls the other
    monkeypatch.setattr(infllm_flex_ops, "tile_blocks", None)
    assert torch.equal(steps.attend(), expected)
    with pytest.raises(TypeError, match="not callable"):
        steps.build_lists()


def test_dense_flex_stays_compiled_however_many_shapes_there_are():
    # PyTorch warns when it runs flex_attention uncompiled, and warnings are errors here.
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for S in (128, 200, 385):
            qkv = QKV(*draw_qkv(S))
            expected = torch.nn.functional.scaled_dot_product_attention(
                *qkv, is_causal=True, enable_gqa=True
            )
            torch.testing.assert_close(_dense_flex(qkv)(), expected)


def test_everything_runs_by_turns_in_a_rotating_order():
    order = []
    subjects = [Subject(name, "", lambda name=name: order.append(name)) for name in "abc"]
    timings = time_in_rotation(subjects, torch.device("cpu"), Limits(1, 3, 100, 0))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [set(parts) for parts in timings] == [{"forward"}] * 3


def test_the_time_of_one_of_several_layers_is_reported():
    done = []
    run = in_turn([lambda layer=layer: done.append(layer) or layer for layer in range(4)])
    assert run() == 3
    assert done == [0, 1, 2, 3]
    subject = Subject("step", "", run, repeats=4)
    limits = Limits(0, 1, 1, 0)
    [timing] = time_in_rotation(
        [subject], torch.device("cpu"), limits, clock=lambda subject: {"forward": 8.0}
    )
    assert timing["forward"] == (2.0, 2.0, 2.0)
