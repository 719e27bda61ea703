#!/usr/bin/env python3
"""Measure the overhead of a patched model below dense_len, and the time of patching.

    scripts/patch_cost.py [--rounds N]

Three tables: microseconds that patching adds to an eager attention call; the time of a compiled
training step, patched over unpatched; seconds to patch models of 7B parameters. Models are random;
the patched and the unpatched one run in rotation.
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
FEW_TOKENS, TOKENS = 8, 64  # few, so that eager time is overhead rather than arithmetic
EAGER_LAYERS = 8  # several, so that the work of a forward outside its layers weighs little


class Attention(nn.Module):
    """Attention of a hand-written model."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, S, width]`` to ``[B, S, width]``."""
        q, k, v = (
            t.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class MethodAttention(Attention):
    """Attention in litgpt's form: a method attends."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, S, width]`` to ``[B, S, width]``."""
        q, k, v = (
            t.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        return self.out(self.scaled_dot_product_attention(q, k, v).reshape(x.shape))

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map ``[B, H, S, D]`` to ``[B, S, H, D]``."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def blocks(kind: type[Attention], layers: int, width: int, heads: int) -> nn.Sequential:
    """Build layers of attention and a perceptron."""
    made = []
    for _ in range(layers):
        mlp = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        made.append(nn.Sequential(nn.LayerNorm(width), kind(width, heads), *mlp))
    return nn.Sequential(*made)


def llama(layers: int, width: int, heads: int) -> nn.Module:
    """Build a Llama of transformers."""
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
    parser.add_argument("--rounds", type=int, default=1000, help="rounds per measurement")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print_eager(rounds)
    print_compiled(rounds)
    print_patching()


def call(model: nn.Module) -> Callable[[Tensor], Any]:
    """Return the function from hidden states to hidden states of a model."""
    if not hasattr(model, "config"):
        return model
    return lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state


def compare(
    model: nn.Module, tokens: int, rounds: int, wrap: Callable[[Any], Any], train: bool
) -> tuple[float, float]:
    """Return the milliseconds of a pass unpatched and patched, below dense_len.

    The 20th percentile, which depends less than the median on the load of the machine.
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
    """Print the overhead of an eager attention call."""
    rows = []
    for name, make in MODELS.items():
        model = make(EAGER_LAYERS, WIDTH, HEADS).eval()
        unpatched, patched = compare(model, FEW_TOKENS, 5 * rounds, lambda f: f, False)
        microseconds = (1e3 * t / EAGER_LAYERS for t in (unpatched, patched, patched - unpatched))
        rows.append([name, *(f"{t:.1f}" for t in microseconds)])
    head = ["eager pass, µs per layer", "unpatched", "patched", "longer by"]
    print(format_table(head, rows), end="\n\n")


def print_compiled(rounds: int) -> None:
    """Print the ratio of compiled training steps."""
    rows = []
    for name, make in MODELS.items():
        torch.compiler.reset()
        unpatched, patched = compare(
            make(2, WIDTH, HEADS).train(), TOKENS, rounds, torch.compile, True
        )
        rows.append([name, f"{unpatched:.3f}", f"{patched:.3f}", f"{patched / unpatched:.4f}"])
    head = ["compiled training step, ms", "unpatched", "patched", "ratio"]
    print(format_table(head, rows), end="\n\n")


def print_patching() -> None:
    """Print the seconds to patch a 7B model on the meta device."""
    rows = []
    for name, make in MODELS.items():
        with torch.device("meta"):
            model = make(32, 4096, 32)
        parameters = sum(p.numel() for p in model.parameters())
        started = time.perf_counter()
        ifx.patch_model(model)
        patched = time.perf_counter()
        ifx.unpatch_model(model)
        undone = time.perf_counter()
        seconds = (patched - started, undone - patched)
        rows.append([name, f"{parameters / 1e9:.1f}e9", *(f"{s:.3f}" for s in seconds)])
    print(format_table(["on meta", "parameters", "patch, s", "unpatch, s"], rows))


if __name__ == "__main__":
    main()
