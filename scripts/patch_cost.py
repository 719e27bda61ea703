#!/usr/bin/env python3
"""Measure what a patched model adds on the host, and the time of patching.

    scripts/patch_cost.py [--rounds N]

Four tables: microseconds that patching adds to an eager attention call; to an eager decode step,
below dense_len and past it, there without the operators of the step, which are launches on a GPU;
the time of a compiled training step, patched over unpatched; seconds to patch models of 7B
parameters. Models are random; the patched and the unpatched one run in rotation.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infllm_flex as ifx
import infllm_flex.decoding.attention as decoding_attention
import infllm_flex_ops
from benchmarking.timing import Limits, Subject, time_in_rotation
from benchmarking.whole_models.runs import cache_keyword
from commands.standard_output import run_command
from evaluation.table import format_table

WIDTH, HEADS = 128, 4
FEW_TOKENS, TOKENS = 8, 64  # few, so that eager time is overhead rather than arithmetic
PROMPT = 64  # tokens before a decode step
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


# Settings under which a short sequence is sparse.
SMALL = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 16, "topk": 4}
MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "F.scaled_dot_product_attention": lambda *size: blocks(Attention, *size),
    "litgpt's method": lambda *size: blocks(MethodAttention, *size),
    "transformers": llama,
}


def main() -> int:
    """Print the four tables; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000, help="rounds per measurement")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print_eager(rounds)
    print_decode(rounds)
    print_compiled(rounds)
    print_patching()
    return 0


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


def print_decode(rounds: int) -> None:
    """Print the overhead of an eager decode step over a cache of transformers."""
    model: Any = llama(EAGER_LAYERS, WIDTH, HEADS).eval()
    below = ifx.patch_model(copy.deepcopy(model))
    past = ifx.patch_model(copy.deepcopy(model), {**SMALL, "dense_len": PROMPT})
    rows = []
    for name in ("dynamic", "static"):
        subjects = [decode_subject(each, name, rounds) for each in (model, below, past)]
        with without_decode_operators():
            limits = Limits(10, rounds, rounds, 0)
            timings = time_in_rotation(subjects, torch.device("cpu"), limits, thread_clock)
        times = [1e3 * timing["forward"].p20 / EAGER_LAYERS for timing in timings]
        more = (f"{t:.1f} ({100 * (t / times[0] - 1):+.1f} %)" for t in times[1:])
        rows.append([f"{name} cache", f"{times[0]:.1f}", *more])
    head = ["decode step, µs per layer", "unpatched", "below dense_len", "past dense_len"]
    print(format_table(head, rows), end="\n\n")


def decode_subject(model: Any, name: str, rounds: int) -> Subject:
    """Return the next step of a model, over a cache that holds a prompt."""
    from transformers import DynamicCache, StaticCache

    capacity = PROMPT + rounds + 100
    dynamic = name == "dynamic"
    cache: Any = DynamicCache() if dynamic else StaticCache(model.config, max_cache_len=capacity)
    argument = {cache_keyword(model): cache}

    @torch.no_grad()
    def run(tokens: int = 1) -> None:
        model(inputs_embeds=torch.zeros(1, tokens, WIDTH), **argument)

    run(PROMPT)
    return Subject("step", name, run)


@contextlib.contextmanager
def without_decode_operators() -> Iterator[None]:
    """Let the operators of a decode step on the CPU do nothing."""
    with (
        mock.patch.object(infllm_flex_ops.append_windows, "plain", _take_nothing),
        mock.patch.object(decoding_attention, "decode_step", _return_query),
    ):
        yield


def _take_nothing(*_: Any) -> None:
    return None


def _return_query(query: Tensor, *_: Any) -> Tensor:
    return query


def thread_clock(subject: Subject) -> dict[str, float]:
    """Time this thread alone, so that other work of the machine counts less."""
    started = time.thread_time_ns()
    subject.forward()
    return {"forward": (time.thread_time_ns() - started) / 1e6}


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
    sys.exit(run_command(main))
