#!/usr/bin/env python3
"""Measure how much of a model's dense attention block selection would keep, layer by layer.

    scripts/evaluate.py --model FOLDER --text FILE --length 16384 [attention.topk=64 ...]

The model, a folder that transformers can load, attends densely to the text. For every layer that
would be sparse, the table shows how much of its attention lies in the blocks it would select, in as
many blocks of largest weight, and in the window, and how many blocks a tile of 4, 8 or 32 tokens
would load per selected block. Exit status: 0 done, 1 failed, 2 settings that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from commands.standard_output import run_command
from evaluation.overrides import parse_overrides
from evaluation.selection import SelectionReport, judge_selection, recorded_inputs
from evaluation.table import format_table
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import patch_model
from infllm_flex.training.model import load_model

HEADER = ("layer", "blocks", "mass", "best", "window", "single", "u(4)", "u(8)", "u(32)")


def main() -> int:
    """Run the command and return its exit status."""
    options = parse_arguments()
    try:
        overrides = parse_overrides(options.overrides)
        if not options.model.is_dir():
            raise ValueError(f"--model must be a folder, got {options.model}")
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device must be there, got {device} where PyTorch sees no GPU")
        tokens = read_tokens(options.text, options.model, options.length)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: no such device
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        evaluate(options.model, tokens, overrides, device)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE")
    parser.add_argument("--length", required=True, type=int, help="tokens of the text to read")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs="*", metavar="attention.key=value")
    return parser.parse_intermixed_args()


def read_tokens(text: Path, model: Path, length: int) -> torch.Tensor:
    """Read the first tokens ``[1, length]`` of a text; bytes where the model has no tokenizer."""
    if (model / "tokenizer_config.json").exists() or (model / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        tokens = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    else:
        tokens = list(text.read_bytes())
    if not 1 <= length <= len(tokens):
        raise ValueError(
            f"--length must be between 1 and the text's {len(tokens)} tokens, got {length}"
        )
    return torch.tensor([tokens[:length]])


def evaluate(
    folder: Path, tokens: torch.Tensor, overrides: dict[str, Any], device: torch.device
) -> None:
    """Run the model once, and judge selection by the inputs of its layers."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = patch_model(load_model(folder, dtype, "--model").to(device).eval(), None, **overrides)
    config = next(iter(model_configs(model)))
    with recorded_inputs(model) as inputs, torch.no_grad():
        model(tokens.to(device), use_cache=False)
    reports = {name: judge_selection(layer, config) for name, layer in inputs.items()}
    print(
        f"{tokens.shape[1]} tokens, second half; {config.num_selected} blocks of "
        f"{config.block_size} a token = {config.budget_tokens} tokens\n"
    )
    print(format_table(HEADER, [row(name, report) for name, report in reports.items()]))
    print(
        "\nmass: fraction of dense attention in the selected blocks; best: in as many blocks of "
        "largest\nweight; window: in as many blocks, the first and the nearest; single: in the 8 "
        "strongest keys of\na head, the same for all tokens, outside the blocks that are always "
        "selected (attention sinks,\nwhich scores of pooled keys may miss); u(n): blocks that a "
        "tile of n tokens loads per selected block"
    )


def model_configs(model: Any) -> list[InfLLMConfig]:
    """Return the settings of the sparse layers."""
    from infllm_flex.patch.huggingface import patched_layers

    return [layer.config for layer in patched_layers(model).values() if layer.skip_reason is None]


def row(name: str, report: SelectionReport) -> list[str]:
    """Format one line of the table."""
    numbers = (report.mass, report.mass_best, report.mass_window, report.mass_single)
    return [
        name,
        f"{report.blocks:.1f}",
        *(f"{number:.3f}" for number in numbers),
        *(f"{report.inflation[tokens]:.2f}" for tokens in (4, 8, 32)),
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
