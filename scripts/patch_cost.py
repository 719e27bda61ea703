#!/usr/bin/env python3
"""Measure what patching itself costs: below dense_len, where nothing else changes, and once.

    scripts/patch_cost.py [--rounds N]

Three tables: microseconds that an eager attention call takes longer patched than unpatched;
the time of a compiled training step, patched over unpatched; seconds to patch models of the size
of a 7B one. Models are random, the patched and the unpatched one run by turns.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infllm_flex as ifx
from benchmarking.timing import Limits, Subject, time_in_rotation
from evaluation.table import format_table

WIDTH, HEADS = 128, 4
FEW_TOKENS, TOKENS = 8, 64  # few, so that eager time is that of calls rather than of numbers
EAGER_LAYERS = 8  # what a forward does once is shared out


class Attention(nn.Module):
    """As a hand-written model has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, width]`` to the same."""
        q, k, v = (
            t.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class MethodAttention(Attention):
    """As litgpt has it: a method attends."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, width]`` to the same."""
        q, k, v = (
            t.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        return self.out(self.scaled_dot_product_attention(q, k, v).reshape(x.shape))

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, H, S, D]`` to ``[B, S, H, D]``."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def blocks(kind: type[Attention], layers: int, width: int, heads: int) -> nn.Sequential:
    """Layers of attention and a perceptron."""
    made = []
    for _ in range(layers):
        mlp = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        made.append(nn.Sequential(nn.LayerNorm(width), kind(width, heads), *mlp))
    return nn.Sequential(*made)


def llama(layers: int, width: int, heads: int) -> nn.Module:
    """The same in transformers."""
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )
    )


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "F.scaled_dot_product_attention": lambda *size: blocks(Attention, *size),
    "litgpt's method": lambda *size: blocks(MethodAttention, *size),
    "transformers": llama,
}


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000, help="turns per measurement")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print_eager(rounds)
    print_compiled(rounds)
    print_patching()


def call(model: nn.Module) -> Callable[[Tensor], Any]:
    """What takes hidden states."""
    if not hasattr(model, "config"):
        return model
    return lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state


def compare(
    model: nn.Module, tokens: int, rounds: int, wrap: Callable[[Any], Any], train: bool
) -> tuple[float, float]:
    """Milliseconds of a pass unpatched and patched, below dense_len.

    A fifth of the passes is faster: less than the median depends on what else the machine does.
    """
    twin = ifx.patch_model(copy.deepcopy(model))
    x = torch.randn(1, tokens, WIDTH, requires_grad=train)

    def subject(module: nn.Module) -> Subject:
        function = wrap(call(module))

        def run() -> None:
            with torch.set_grad_enabled(train):
                out = function(x)
                if train:
                    out.sum().backward()

        return Subject("model", "", run)

    limits = Limits(10, rounds, rounds, 0)
    timings = time_in_rotation([subject(model), subject(twin)], torch.device("cpu"), limits)
    unpatched, patched = (timing["forward"].p20 for timing in timings)
    return unpatched, patched


def print_eager(rounds: int) -> None:
    """Overhead of an eager attention call."""
    rows = []
    for way, make in MODELS.items():
        model = make(EAGER_LAYERS, WIDTH, HEADS).eval()
        unpatched, patched = compare(model, FEW_TOKENS, 5 * rounds, lambda f: f, False)
        microseconds = (1e3 * t / EAGER_LAYERS for t in (unpatched, patched, patched - unpatched))
        rows.append([way, *(f"{t:.1f}" for t in microseconds)])
    head = ["eager pass, µs per layer", "unpatched", "patched", "longer by"]
    print(format_table(head, rows), end="\n\n")


def print_compiled(rounds: int) -> None:
    """Ratio of compiled training steps."""
    rows = []
    for way, make in MODELS.items():
        torch.compiler.reset()
        unpatched, patched = compare(
            make(2, WIDTH, HEADS).train(), TOKENS, rounds, torch.compile, True
        )
        rows.append([way, f"{unpatched:.3f}", f"{patched:.3f}", f"{patched / unpatched:.4f}"])
    head = ["compiled training step, ms", "unpatched", "patched", "ratio"]
    print(format_table(head, rows), end="\n\n")


def print_patching() -> None:
    """Seconds to patch a 7B model that has no memory behind it."""
    rows = []
    for way, make in MODELS.items():
        with torch.device("meta"):
            model = make(32, 4096, 32)
        parameters = sum(p.numel() for p in model.parameters())
        started = time.perf_counter()
        ifx.patch_model(model)
        patched = time.perf_counter()
        ifx.unpatch_model(model)
        undone = time.perf_counter()
        seconds = (patched - started, undone - patched)
        rows.append([way, f"{parameters / 1e9:.1f}e9", *(f"{s:.3f}" for s in seconds)])
    print(format_table(["on meta", "parameters", "patch, s", "unpatch, s"], rows))


if __name__ == "__main__":
    main()
