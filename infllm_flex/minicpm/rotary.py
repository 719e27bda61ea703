"""Longrope without a branch on values, so that every version of transformers makes one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class LongRotaryEmbedding(nn.Module):
    """Rotary embedding with two sets of frequencies; the highest position decides which is used.

    Older versions of transformers read the decision from the device, which breaks the graph.

    Args:
        config: A `MiniCPMConfig` with longrope.
    """

    # When transformers loads a model, it fills both buffers by the function below for a class with
    # RotaryEmbedding in its name, this type, and an `original_inv_freq`.
    rope_type = "default"
    inv_freq: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        frequencies, self.attention_scaling = self.compute_default_rope_parameters(config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute short and long frequencies, ``[2, D / 2]``, and a factor on cosines and sines."""
        original = config.rope_parameters["original_max_position_embeddings"]
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        short, factor = compute(config, seq_len=original)
        long, _ = compute(config, seq_len=original + 1)
        return torch.stack((short, long)), factor

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the cosines and sines of all positions.

        Args:
            x: A tensor whose dtype the result takes.
            position_ids: int64 ``[B, S]``.

        Returns:
            Cosines and sines, ``[B, S, D]`` each.
        """
        original = self.config.rope_parameters["original_max_position_embeddings"]
        short, long = self.inv_freq.float()
        frequencies = torch.where(position_ids.max() < original, short, long)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)
