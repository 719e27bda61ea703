"""How the layers of a model are run: compiled, in 8 bits, or twice to spare memory."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from infllm_flex.training.settings import TrainingSettings

_FLOAT8_MULTIPLE = 16  # of the sizes of a product, by the hardware


@contextlib.contextmanager
def run_layers(
    layers: Sequence[nn.Module], settings: TrainingSettings, device: torch.device
) -> Iterator[None]:
    """Run layers as the settings say inside the block.

    What is wrapped is their forward, not the module: FSDP's hooks stay outside, so that what it
    gathers for the backward pass serves the recomputation too. For a block, as a graph compiled
    before a model is patched would not see the patch.
    """
    compiled = settings.run.compile == "always" or (
        settings.run.compile == "auto" and device.type == "cuda"
    )
    for layer in layers:
        forward: Any = layer.forward
        if compiled:
            forward = torch.compile(forward)
        if settings.memory.activation_checkpointing:
            # The compiled part inside: compiled from outside, what it recomputes is its own choice.
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def use_float8(model: Any, device: torch.device) -> None:
    """Compute the products of a model's linear layers in float8, all but those of its head.

    Weights and their names stay as they are. Each tensor is scaled by its largest value.

    Args:
        model: A transformers model.
        device: Where it will be. A CPU imitates the rounding, slowly.

    Raises:
        ValueError: The GPU has no float8, or no layer fits.
    """
    check_float8(device)
    head = model.get_output_embeddings()

    def fits(module: nn.Module, name: str) -> bool:
        return (
            isinstance(module, nn.Linear)
            and module is not head
            and module.in_features % _FLOAT8_MULTIPLE == 0
            and module.out_features % _FLOAT8_MULTIPLE == 0
        )

    if not any(fits(module, name) for name, module in model.named_modules()):
        raise ValueError(
            f"model.float8: no linear layer of {type(model).__name__} has sizes that are multiples "
            f"of {_FLOAT8_MULTIPLE}"
        )
    with _quiet_torchao():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = Float8LinearConfig(emulate=device.type == "cpu")
    convert_to_float8_training(model, module_filter_fn=fits, config=config)


def check_float8(device: torch.device) -> None:
    """Refuse a GPU without float8, and say so of a CPU.

    Raises:
        ValueError: The GPU has no float8.
    """
    if device.type == "cpu":
        warnings.warn("model.float8: this CPU only imitates it, to try it out", stacklevel=2)
    elif torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"model.float8: {torch.cuda.get_device_name(device)} has none; Ada, Hopper and newer do"
        )


@contextlib.contextmanager
def _quiet_torchao() -> Iterator[None]:
    """It warns on import of every kernel that other hardware would need."""
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
