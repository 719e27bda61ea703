"""What spares memory at the price of time."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(layers: Iterable[nn.Module]) -> None:
    """Keep only the inputs of these modules for the backward pass; the rest is computed again.

    Their forward is what is run again, not the module: what FSDP gathers around a module for the
    backward pass then serves both.
    """
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
