#!/usr/bin/env python3
"""Fine-tune with transformers' Trainer: one call makes its model sparse.

    examples/trainer.py
    examples/trainer.py --model Qwen/Qwen3-0.6B --text FILE --length 32768

Without a model it makes a tiny Llama with random weights, which reads the source code of Python's
standard library as bytes: no download, and a few seconds on a CPU. Trainer needs the package
accelerate.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import infllm_flex as ifx

# For the tiny model. Blocks of 16: a byte sees at most 448 of those before it.
TINY_ATTENTION = ifx.InfLLMConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=26, dense_len=512
)


class Windows(Dataset[dict[str, Tensor]]):
    """Consecutive stretches of ``length`` tokens of a text."""

    def __init__(self, text: Tensor, length: int) -> None:
        self._windows = text[: len(text) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._windows[index].long()
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    """Train, and save a model that says how it attends."""
    options = parse_arguments()
    torch.manual_seed(0)
    if options.model is None:
        model, text, attention = make_model(options.length), read_bytes(), TINY_ATTENTION
        learning_rate = 3e-3
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        text = read_tokens(options.text, options.model)
        attention, learning_rate = None, 1e-5  # None: settings for models without a sparse_config

    # The one line that this example is about; `ifx.unpatch_model(model)` undoes it.
    ifx.patch_model(model, attention)
    layers = ifx.describe(model)
    print(layers)

    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=5,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(text, options.length))
    trainer.train()

    # `ifx.patch_model` and attn_implementation="infllm_flex" read the settings from here.
    model.config.sparse_config = next(row.config.to_sparse_config() for row in layers if row.config)
    trainer.save_model()


def make_model(length: int) -> PreTrainedModel:
    """Make a byte-level Llama with random weights."""
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


def read_bytes() -> Tensor:
    """Read modules of Python's standard library, uint8 ``[N]``."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)


def read_tokens(file: Path, model: str) -> Tensor:
    """Read a text file with a model's tokenizer, int64 ``[N]``."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer(file.read_text(), return_tensors="pt").input_ids[0]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="ID", help="a model id or folder for from_pretrained")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what a given model is tuned to")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"), metavar="FOLDER")
    options = parser.parse_args()
    if options.model is not None and options.text is None:
        parser.error("--model needs --text, the file to tune it to")
    return options


if __name__ == "__main__":
    main()
