"""Longrope without a branch on values: one graph in every version of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class LongRotaryEmbedding(nn.Module):
    """Rotary embedding with two sets of frequencies; the highest position decides between them.

    Older versions of transformers wait for the device to say which set to take, and cannot be
    compiled to one graph for it.

    Args:
        config: A `MiniCPMConfig` with longrope.
    """

    # So that transformers fills both buffers by the function below when it loads a model: a name
    # with RotaryEmbedding, this type, and an `original_inv_freq`.
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
        """Short and long frequencies, ``[2, D / 2]``, and the factor on cosines and sines."""
        original = config.rope_parameters["original_max_position_embeddings"]
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        short, factor = compute(config, seq_len=original)
        long, _ = compute(config, seq_len=original + 1)
        return torch.stack((short, long)), factor

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions.

        Args:
            x: For its dtype.
            position_ids: int64 ``[B, S]``.

        Returns:
            Two of ``[B, S, D]``.
        """
        original = self.config.rope_parameters["original_max_position_embeddings"]
        short, long = self.inv_freq.float()
        frequencies = torch.where(position_ids.max() < original, short, long)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)
