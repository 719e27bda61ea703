"""A folder for from_pretrained: a tiny Llama with random weights and a byte tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

SPARSE_CONFIG = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "window_size": 16,
    "topk": 2,
    "dense_len": 96,
    "engine": "fused",
}


def tiny_config(**changes):
    from transformers import LlamaConfig

    values = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1 << 15,
        "initializer_range": 0.3,  # the usual 0.02 makes all keys nearly equal
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return LlamaConfig(**values | changes)


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def write_tiny_model(folder: Path, **changes) -> Path:
    """Write model and tokenizer; ``changes`` replace values of the model's config."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
