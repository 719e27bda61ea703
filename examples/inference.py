#!/usr/bin/env python3
"""Patch a causal LM, say which layers are sparse, and generate: as it is, and compiled.

    examples/inference.py
    examples/inference.py --model Qwen/Qwen3-8B --text FILE --dense-len 16384

Without a model it makes a tiny Llama with random weights, which reads bytes: no download, and a few
seconds on a CPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import infllm_flex as ifx

# Small enough for the tiny model: a token attends to 12 blocks of 16, 192 tokens at most.
TINY_SETTINGS: dict[str, Any] = {
    "block_size": 16,
    "window_size": 64,
    "topk": 8,
    "dense_len": 256,
    "engine": "fused",  # the other engine would compile FlexAttention first
}


def main() -> None:
    """Generate twice from the same prompt."""
    options = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if options.model is None:
        model, settings = make_model(), TINY_SETTINGS
        prompt = torch.tensor([list(options.text.read_bytes()[:1024])])
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
        settings = {"dense_len": options.dense_len} if options.dense_len is not None else {}
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        prompt = tokenizer(options.text.read_text(), return_tensors="pt").input_ids
    model, prompt = model.to(device).eval(), prompt.to(device)

    # The one line that this example is about; `ifx.unpatch_model(model)` undoes it.
    ifx.patch_model(model, **settings)
    print(ifx.describe(model))

    generated = generate(model, prompt, options.new_tokens)
    compiled = generate_compiled(model, prompt, options.new_tokens, options.backend)
    same = int((generated == compiled).sum())
    print(f"{same} of {generated.shape[1]} generated tokens are the same")
    if options.model is not None:
        print(tokenizer.decode(compiled[0]))


def generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Tensor:
    """Generate greedily over the cache that transformers makes by default, which grows."""
    return timed("eager", model, prompt, new_tokens)


def generate_compiled(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int, backend: str
) -> Tensor:
    """Generate greedily over a static cache, by one graph for all steps."""
    settings: Any = CompileConfig(fullgraph=True, backend=backend)
    if backend != "inductor":
        settings.mode = None  # only Inductor has modes
    settings._compile_all_devices = True  # without it transformers compiles on GPUs only
    static = {"cache_implementation": "static", "compile_config": settings}
    return timed("compiled", model, prompt, new_tokens, **static)


def timed(name: str, model: Any, prompt: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """Generate, print the time, and return the new tokens ``[1, new_tokens]``."""
    start = time.perf_counter()
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **lengths, **options
    )
    new = tokens[:, prompt.shape[1] :].cpu()  # waits for the device
    seconds = time.perf_counter() - start
    print(f"{name}: {new.shape[1]} tokens after {prompt.shape[1]} in {seconds:.1f} s")
    return new


def make_model() -> PreTrainedModel:
    """Make a byte-level Llama with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="ID", help="a model id or folder for from_pretrained")
    parser.add_argument("--text", type=Path, default=Path(__file__), metavar="FILE")
    parser.add_argument("--dense-len", type=int, help="tokens from which attention is sparse")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    return parser.parse_args()


if __name__ == "__main__":
    main()
