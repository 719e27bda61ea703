"""InfLLM-V2 attention for torchtitan, through its override point, without changing a line of it.

With torchtitan 0.3 installed, this folder on the path, and a configuration whose model has
``attn_backend="varlen"``:

    PYTHONPATH=examples torchrun --nproc-per-node 8 -m torchtitan.train --module llama3 --config C \
        --override.imports 'torchtitan_override.sparse_attention={"dense_len": 8192}'

torchtitan packs documents. Each document is dense or sparse by its own length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torchtitan.config import derive, override
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata

import infllm_flex as ifx


class SparseAttention(VarlenAttention):
    """Replaces torchtitan's attention over packed documents."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        """torchtitan's own fields, and the settings of `InfLLMConfig` by name."""

        settings: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.window_size != (-1, 0):
            raise ValueError(f"sparse attention is causal, got window_size {config.window_size}")
        self._config = ifx.InfLLMConfig.from_dict(config.settings)

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend within each document; inputs and result are ``[B, S, heads, D]``."""
        # Rows become one row. No document crosses the end of a row, so the bounds stay right.
        query, key, value = (
            x.flatten(0, 1).transpose(0, 1)[None] for x in (q_BLNH, k_BLNH, v_BLNH)
        )
        out = ifx.infllm_attention(
            query, key, value, self._config, scale=scale, cu_seqlens=attention_masks.cu_seq_q
        )
        return out[0].transpose(0, 1).unflatten(0, q_BLNH.shape[:2])


@override(target=VarlenAttention.Config, exact=True, description="InfLLM-V2 sparse attention")
def sparse_attention(config: VarlenAttention.Config, **settings: Any) -> SparseAttention.Config:
    """Replace attention; ``settings`` are those of `InfLLMConfig`, by name."""
    ifx.InfLLMConfig.from_dict(settings)  # raises here, before the model is built
    return derive(config, SparseAttention.Config, settings=settings)
