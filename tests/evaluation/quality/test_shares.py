"""The fraction of a needle in selected blocks, against known values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import infllm_flex as ifx
from evaluation.quality.arms import AttentionMode
from evaluation.quality.parts import SkippedError
from evaluation.quality.rows import Question, Span
from evaluation.quality.settings import QualitySettings
from evaluation.quality.shares import judge_shares, needle_shares
from evaluation.selection import LayerInputs
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from tests.evaluation.quality.tiny import make_base, settings_of, write_settings

CONFIG = ifx.InfLLMConfig(
    kernel_size=4, kernel_stride=4, block_size=8, init_blocks=1, window_size=8, topk=4, dense_len=-1
)
S, NEEDLE, ASKS = 400, Span(100, 108), 380


def inputs(looking: list[int], strength: float = 40.0) -> LayerInputs:
    """Make four heads in groups of two; the given heads look from ``ASKS`` at the needle."""
    query, key = torch.zeros(1, 4, S, 16), torch.zeros(1, 2, S, 16)
    key[:, :, NEEDLE.start : NEEDLE.end, 0] = 1.0
    query[:, looking, ASKS, 0] = strength
    return LayerInputs(query, key, 0.25)


def question() -> Question:
    return Question(Span(ASKS + 1, ASKS + 5), (NEEDLE,))


def test_heads_that_look_are_counted_and_a_choice_that_finds_holds_all():
    for looking in ([0], [1, 2], [0, 1, 2, 3]):
        held, best = needle_shares(inputs(looking), CONFIG, [question()])
        assert len(held) == len(best) == len(looking)
        # Half of the needle is in block 12, half in block 13; two blocks are not forced.
        assert held == pytest.approx(torch.ones(len(looking)))
        assert best == pytest.approx(torch.ones(len(looking)))


def test_a_choice_without_room_holds_none_and_the_best_as_many_does():
    # The first block, the previous and the own block: no other block is selected.
    window = dataclasses.replace(CONFIG, topk=2)
    held, best = needle_shares(inputs([0]), window, [question()])
    assert held == pytest.approx(torch.zeros(1))
    assert best == pytest.approx(torch.ones(1))


def test_half_a_needle_is_half():
    one_free = dataclasses.replace(CONFIG, topk=3)
    held, best = needle_shares(inputs([0]), one_free, [question()])
    assert held == pytest.approx(torch.full((1,), 0.5))
    assert best == pytest.approx(torch.ones(1))  # the best are four, none of them forced


def test_a_choice_of_more_than_half_is_left_out_with_a_word(tmp_path):
    settings = settings_of(tmp_path / "run", make_base(tmp_path / "base"), tmp_path)
    path = write_settings(tmp_path / "quality.yaml", settings)
    read = build_dataclass(QualitySettings, load_yaml(path))
    wide = AttentionMode("wide", dataclasses.replace(CONFIG, topk=40))
    with pytest.raises(SkippedError, match="at most half of 512 tokens, wide sees 328"):
        judge_shares(read, tmp_path, wide, torch.device("cpu"), None, None, 0)


def test_no_head_looks_no_case():
    held, best = needle_shares(inputs([]), CONFIG, [question()])
    assert len(held) == len(best) == 0
