"""How many blocks the tiles of a model load, with trained weights and with random ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evaluation.quality import base
from evaluation.quality.settings import BaseSettings
from evaluation.selection import judge_selection, recorded_inputs
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import patch_model
from infllm_flex.training.model_weights import load_weights
from infllm_flex.training.quiet import quiet_transformers

_SAMPLES = 8  # tokens whose dense attention is computed, which nothing here reads


@torch.no_grad()
def tile_inflation(model: Any, config: InfLLMConfig, **inputs: Tensor) -> dict[int, float]:
    """Measure the blocks that a tile loads, per block that one of its tokens selects.

    Args:
        model: A patched model. It attends densely here.
        config: Settings of the selection.
        inputs: One sequence: ``input_ids [1, S]`` or ``inputs_embeds [1, S, width]``.

    Returns:
        The ratio by tokens of a tile: the mean over the layers, and over the tokens of the second
        half of the sequence. 1 means that the tokens of a tile select the same blocks.

    Raises:
        ValueError: The second half of the sequence lies within the budget of the selection.
    """
    with recorded_inputs(model) as layers:
        model.get_decoder()(use_cache=False, **inputs)
    found: dict[int, list[float]] = {}
    for layer in layers.values():
        report = judge_selection(layer, config, samples=_SAMPLES)
        for tokens, ratio in report.inflation.items():
            found.setdefault(tokens, []).append(ratio)
    return {tokens: sum(some) / len(some) for tokens, some in found.items()}


def trained_model(package: str, length: int) -> tuple[Any, Tensor]:
    """Load a small trained model, and a text: the language reference that comes with Python.

    Args:
        package: A Python package with one ``.gguf`` file.
        length: Tokens.

    Returns:
        The patched model, on the CPU in float32, and token ids ``[1, length]``.

    Raises:
        BaseError: The package, the one that reads its file, or the text is not installed.
    """
    source = base.find(BaseSettings(package=package))
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise base.BaseError(f"this Python lacks its language reference: {error}") from error
    options: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": False,
        "gguf_file": source.gguf_file,
    }
    model = load_weights(
        source.folder, "base.package", dtype=torch.float32, gguf_file=source.gguf_file
    )
    with quiet_transformers() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **options)
    ids = tokenizer("\n".join(topics.values())).input_ids[:length]
    if len(ids) < length:
        raise base.BaseError(f"the text has {len(ids)} tokens, fewer than the {length} asked for")
    return patch_model(model.eval()), torch.tensor([ids])
