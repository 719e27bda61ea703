"""Compilation, float8 and activation checkpointing of a model's layers."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager as ContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from infllm_flex.patch.running_forward import RecomputedForward
from infllm_flex.training.quiet import quiet_loggers
from infllm_flex.training.settings import TrainingSettings

_FLOAT8_MULTIPLE = 16  # the hardware takes products whose sizes are multiples of this


@contextlib.contextmanager
def run_layers(
    layers: Sequence[nn.Module], settings: TrainingSettings, device: torch.device
) -> Iterator[None]:
    """Compile and checkpoint the layers' forward methods for the block, as the settings ask.

    The forward method is wrapped, not the module, because FSDP's hooks must stay outside: the
    weights gathered for the backward pass then also serve the recomputation. The wrapping ends with
    the block because a graph compiled before a model is patched would not contain the patch.
    """
    compiled = settings.run.compile == "always" or (
        settings.run.compile == "auto" and device.type == "cuda"
    )
    for layer in layers:
        forward: Any = layer.forward
        if compiled:
            forward = torch.compile(forward)
        if settings.memory.activation_checkpointing:
            # Checkpointing goes outside: if the compiler saw it, it would choose what to recompute.
            forward = functools.partial(
                checkpoint, forward, use_reentrant=False, context_fn=_contexts
            )
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # uncovers the method of the class


def _contexts() -> tuple[ContextManager[Any], ContextManager[Any]]:
    """The contexts of a checkpointed layer's forward and of its recomputation."""
    return contextlib.nullcontext(), RecomputedForward()


def use_float8(model: Any, device: torch.device) -> None:
    """Compute the products of a model's linear layers, except its head, in float8.

    Weights and their names stay unchanged. Each tensor is scaled by its largest value.

    Args:
        model: A transformers model.
        device: The training device. A CPU emulates the rounding, slowly.

    Raises:
        ValueError: The GPU has no float8, or no layer has suitable sizes.
    """
    check_float8(device)
    head = model.get_output_embeddings()

    def is_suitable(module: nn.Module, name: str) -> bool:
        return (
            isinstance(module, nn.Linear)
            and module is not head
            and module.in_features % _FLOAT8_MULTIPLE == 0
            and module.out_features % _FLOAT8_MULTIPLE == 0
        )

    if not any(is_suitable(module, name) for name, module in model.named_modules()):
        raise ValueError(
            f"model.float8: no linear layer of {type(model).__name__} has sizes that are multiples "
            f"of {_FLOAT8_MULTIPLE}"
        )
    # torchao warns on import about every kernel meant for other hardware.
    with quiet_loggers("torchao"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = Float8LinearConfig(emulate=device.type == "cpu")
    convert_to_float8_training(model, module_filter_fn=is_suitable, config=config)


def check_float8(device: torch.device) -> None:
    """Refuse a GPU without float8; warn that a CPU emulates it.

    Raises:
        ValueError: The GPU has no float8.
    """
    if device.type == "cpu":
        warnings.warn("model.float8: the CPU emulates float8, for trials only", stacklevel=2)
    elif torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"model.float8: {torch.cuda.get_device_name(device)} has no float8; use Ada, Hopper or "
            "a newer GPU, or set model.float8 to false"
        )
