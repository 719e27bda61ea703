"""Costs by position mean what their names say."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evaluation.by_position import (
    Bucket,
    bits_per_token,
    distant_repeats,
    doubling_buckets,
    standard_error,
)
from evaluation.plot import plot_by_position
from evaluation.table import format_table


class Repeater(nn.Module):
    """Sure, to a known degree, that every token is the one before it plus one."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.modes = []

    def forward(self, tokens, use_cache):
        self.modes.append((self.training, torch.is_grad_enabled()))
        logits = torch.zeros(*tokens.shape, 256)
        logits.scatter_(-1, (tokens + 1)[..., None] % 256, math.log(255))
        return SimpleNamespace(logits=logits)


def test_each_cost_belongs_to_the_token_after_its_position():
    windows = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 10], [7, 0, 1, 5]])
    model = Repeater().train()
    done = []
    bits = bits_per_token(model, windows, batch_size=2, after_batch=done.append)
    surprise = math.log2(510)
    expected = torch.tensor([[1, 1, 1], [1, surprise, 1], [surprise, 1, surprise]])
    torch.testing.assert_close(bits, expected)
    assert done == [2, 1]
    assert model.training
    assert model.modes == [(False, False)] * 2


def test_buckets_cover_every_position_once():
    assert list(map(str, doubling_buckets(2048, 256))) == [
        "1-256",
        "257-512",
        "513-1024",
        "1025-2048",
    ]
    assert list(map(str, doubling_buckets(300, 256))) == ["1-256", "257-300"]
    bits = torch.arange(1, 11.0).expand(3, 10)
    assert Bucket(3, 4).mean(bits) == 3.5


def test_the_error_of_a_mean_shrinks_with_the_number_of_windows():
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    assert math.isnan(standard_error(torch.tensor([1.0])))


def text(string):
    return torch.tensor([list(string.encode())])


def marked(string, distance):
    marks = distant_repeats(text(string), distance)[0].tolist()
    return "".join(c if m else "." for c, m in zip(string[1:], marks, strict=True))


def test_the_rest_of_a_word_last_seen_far_back_is_a_distant_repeat():
    string = "alpha beta ........ alpha beta alpha"
    assert marked(string, 15) == "." * 21 + "pha" + "..." + "ta" + "." * 6
    assert marked(string, 30) == "." * (len(string) - 1)


def test_a_part_of_a_word_or_a_short_word_is_no_repeat():
    assert "l" not in marked("alphabet ............ alpha", 5)
    assert "c" not in marked("abc ............ abc", 5)


def test_tables_align_text_left_and_numbers_right():
    assert format_table(["model", "bits"], [["a", "1.5"], ["longer", "10.25"]]) == (
        "model    bits\n------  -----\na         1.5\nlonger  10.25"
    )


def test_the_plot_is_a_png(tmp_path):
    path = tmp_path / "new" / "plot.png"
    bits = {"dense": torch.rand(3, 128), "sparse": torch.rand(3, 128)}
    plot_by_position(path, bits, baseline="dense", smooth=16, title="Bits")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
