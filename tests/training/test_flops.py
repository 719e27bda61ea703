"""The computed FLOPs of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infllm_flex.training.flops import FlopCounter, document_lengths, peak_flops
from infllm_flex.training.loss import LanguageLoss
from infllm_flex.training.model import build_model
from infllm_flex.training.settings import (
    ModelSettings,
    TinyModelSettings,
)
from tests.training.runs import ATTENTION, stage

MODEL = ModelSettings(
    tiny=TinyModelSettings(
        num_layers=3, hidden_size=64, intermediate_size=160, num_heads=4, num_kv_heads=2
    )
)
LENGTH = 256


@pytest.fixture(scope="module")
def model():
    return build_model(MODEL, LENGTH)


def test_flops_of_dense_attention_are_those_that_torch_counts(model):
    tokens = torch.randint(256, (2, LENGTH))
    # torch counts the products of eager attention on every device, unlike those of SDPA.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        LanguageLoss(model)(tokens, input_ids=tokens, use_cache=False).backward()
    work = FlopCounter(model, stage(max_length=LENGTH), ATTENTION)
    ours = work.flops([LENGTH, LENGTH])
    upper_triangle = ours - 2 * LENGTH * work._per_token  # eager attention computes it too
    assert ours + upper_triangle == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_sparse_attention_follow_from_the_budget_and_the_scores(model):
    def attention_alone(attention, length):
        work = FlopCounter(model, stage(attention="sparse", max_length=length), attention)
        return work.flops([length]) - length * work._per_token

    budget = ATTENTION.num_selected * ATTENTION.block_size  # 24 tokens
    layers_times_width = 3 * 64
    seen = budget * budget / 2 + (256 - budget) * budget
    scored = 256 * 256 / 2 * (1 / 2 + 1 / 8)
    assert attention_alone(ATTENTION, 256) == layers_times_width * 2 * (6 * seen + scored)
    always_dense = replace(ATTENTION, dense_len=257)
    assert attention_alone(always_dense, 256) == layers_times_width * 12 * 256 * 256 / 2


@pytest.mark.parametrize(
    ("settings", "heads", "keys_per_token", "dims"),
    [
        # 4 query heads in groups of 2: pooled queries are half as many.
        ({"kernel_size": 1, "kernel_stride": 1, "pool_queries": True}, 2, 1, 16),
        ({"kernel_size": 1, "kernel_stride": 1, "pool_queries": True, "score_dims": 4}, 2, 1, 4),
        ({"kernel_size": 4, "kernel_stride": 4, "pool_queries": True}, 2, 1 / 4, 16),
        ({"lse": "exact"}, 4, 1 / 2, 16),
    ],
)
def test_scores_count_the_queries_and_keys_that_are_multiplied(
    model, settings, heads, keys_per_token, dims
):
    attention = replace(ATTENTION, **settings)
    work = FlopCounter(model, stage(attention="sparse", max_length=256), attention)
    budget = attention.budget_tokens
    seen = budget * budget / 2 + (256 - budget) * budget
    scored = heads * 256 * 256 / 2 * keys_per_token
    head_dim = 16
    expected = 3 * 2 * (head_dim * 6 * 4 * seen + dims * scored)
    assert work.flops([256]) - 256 * work._per_token == expected


def test_by_position_the_first_queries_of_a_long_document_count_as_dense(model):
    by_position = replace(ATTENTION, dense_by="position")  # dense up to 63 tokens, a budget of 24
    work = FlopCounter(model, stage(attention="sparse"), by_position)
    assert work.sparse_tokens([63, 64, 200]) == 1 + 137
    attention = work.flops([200]) - 200 * work._per_token
    seen = 63 * 63 / 2 + 137 * 24
    scored = (200 * 200 - 63 * 63) / 2 * (1 / 2 + 1 / 8)
    assert attention == 3 * 64 * 2 * (6 * seen + scored)
    within_budget = replace(by_position, dense_len=20)
    assert FlopCounter(model, stage(attention="sparse"), within_budget).flops([63]) < (
        FlopCounter(model, stage(attention="dense"), ATTENTION).flops([63])
    )


def test_only_documents_of_dense_len_count_as_sparse(model):
    work = FlopCounter(model, stage(attention="sparse"), ATTENTION)
    assert work.sparse_tokens([63, 64, 200]) == 264
    assert FlopCounter(model, stage(attention="dense"), ATTENTION).sparse_tokens([64, 200]) == 0


def test_documents_start_at_position_zero():
    positions = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]])
    assert document_lengths(4, 2, positions) == [3, 1, 1, 3]
    assert document_lengths(4, 2, None) == [4, 4]


def test_the_peak_of_a_device_comes_from_its_name_or_the_setting(monkeypatch):
    assert peak_flops(torch.device("cpu"), None) is None
    assert peak_flops(torch.device("cpu"), 2.5) == 2.5e12
    gpu = torch.device("cuda", 0)
    for name, peak in [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, None) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA of Tomorrow")
    assert peak_flops(gpu, None) is None
