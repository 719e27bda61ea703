"""A tiny random model with a word tokenizer, a few texts, and settings for them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 512


def words(count: int = 420) -> list[str]:
    random = Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choice("bcdfglmnprst") + random.choice("aeiou") for _ in "ab")] = None
    return list(found)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
    )
    tokenizer.train_from_iterator([" " + " ".join(words())] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def make_spaced_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that begins a text with a space, and a sequence with a token, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        show_progress=False,
        initial_alphabet=[chr(code) for code in (10, *range(33, 127))],
        special_tokens=["<begin>", "<end>"],
    )
    tokenizer.train_from_iterator([" " + " ".join(words())] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>"
    )


def make_base(folder: Path, **changes: Any) -> Path:
    tokenizer = make_tokenizer()
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(values | changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_texts(folder: Path, folders: int = 40, size: int = 6000) -> Path:
    random, known = Random(1), words()
    for number in range(folders):
        path = folder / f"part{number}" / "text.txt"
        path.parent.mkdir(parents=True)
        text = ""
        while len(text) < size:
            text += " ".join(random.choices(known, k=9)) + "\n"
        path.write_text(text)
    return folder


def settings_of(run: Path, base: Path, texts: Path) -> dict[str, Any]:
    attention = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8}
    attention |= {"window_size": 16, "topk": 6, "dense_len": 64}
    return {
        "run": {
            "folder": str(run),
            "seeds": [0, 1],
            "device": "cpu",
            "table": str(run / "table.csv"),
            "plot": str(run / "plot.png"),
        },
        "base": {"folder": str(base)},
        "text": {"source": str(texts), "pattern": "*.txt", "held_out_percent": 20},
        "tuning": {
            "length": LENGTH,
            "batch_size": 2,
            "steps": 3,
            "learning_rate": 1e-3,
            "warmup_steps": 1,
            "workers": 0,
            "questions": 3,
        },
        "variants": {"fine": {"attention": attention, "back_to_dense": True}},
        "judge": {"items": 4, "windows": 3, "programs": 2, "share_rows": 1},
    }


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path
