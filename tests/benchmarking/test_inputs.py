"""Random inputs have the similarity between queries that their name promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarking.inputs import make_qkv
from benchmarking.settings import Heads
from infllm_flex import InfLLMConfig, select_blocks
from infllm_flex_ops.block_lists import union_lists


def test_neighbouring_queries_are_similar_only_where_they_drift(settings):
    def similarity(inputs):
        query = make_qkv(settings, Heads(4, 2), 1000, inputs).query
        return torch.cosine_similarity(query[:, :, 1:], query[:, :, :-1], dim=-1).mean()

    assert similarity("drifting") > 0.7
    assert similarity("text") > 0.6
    assert abs(similarity("independent")) < 0.1


def test_heads_of_a_group_have_half_in_common_in_text(settings):
    query = make_qkv(settings, Heads(4, 2), 4000, "text").query[0]
    same, other = (torch.cosine_similarity(query[0], query[h], dim=-1).mean() for h in (1, 2))
    assert same > 0.25
    assert abs(other) < 0.1


def test_tiles_of_text_hold_as_many_blocks_as_those_of_a_trained_model(settings):
    S, half = 16384, 8192
    shapes = dataclasses.replace(settings.shapes, head_dim=64)
    attention = InfLLMConfig(topk=56, window_size=512)
    query, key, _ = make_qkv(dataclasses.replace(settings, shapes=shapes), Heads(16, 1), S, "text")
    selected = select_blocks(query[:, :, half:], key, attention)
    for tokens, measured in {2: 1.16, 4: 1.29, 8: 1.42, 16: 1.54, 32: 1.66}.items():
        num, _, _ = union_lists.list_blocks(selected, S, attention.block_size, tokens)
        assert num.float().mean() / 64 == pytest.approx(measured, abs=0.03)
