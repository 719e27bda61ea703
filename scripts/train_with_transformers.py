#!/usr/bin/env python3
"""The same fine-tuning in the hands of transformers' Trainer: one call makes its model sparse.

    scripts/train_with_transformers.py [--model FOLDER] [--length 1024] [--steps 20]

Without a folder it makes a tiny model with random weights. The text is the source code of Python's
standard library, as bytes. Trainer needs the package accelerate.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import infllm_flex as ifx
from infllm_flex.training.data import load_corpus
from infllm_flex.training.settings import DataSettings

# Small enough for a CPU. Blocks of 16: a byte sees at most 448 of those before it.
ATTENTION = ifx.InfLLMConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    window_size=32,
    topk=26,
    dense_len=512,
    engine="fused",
)


class Windows(Dataset[dict[str, Tensor]]):
    """Stretches of the text, one behind the other."""

    def __init__(self, text: Tensor, length: int) -> None:
        self._windows = text[: len(text) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._windows[index].long()
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    """Train, and save a model that transformers loads."""
    options = parse_arguments()
    torch.manual_seed(0)
    model = read_model(options.model) if options.model else make_model(options.length)

    # The one line that this is about; `ifx.unpatch_model(model)` undoes it.
    ifx.patch_model(model, ATTENTION)
    print(ifx.describe(model))

    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=5,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    text = load_corpus(DataSettings()).train_stream()
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(text, options.length))
    trainer.train()

    # What is saved says how it attended: `ifx.patch_model` finds it there.
    model.config.sparse_config = asdict(ATTENTION)
    trainer.save_model()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a transformers model folder")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"), metavar="FOLDER")
    return parser.parse_args()


def read_model(folder: Path) -> PreTrainedModel:
    """A model from a local folder."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def make_model(length: int) -> PreTrainedModel:
    """A byte-level Llama with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
