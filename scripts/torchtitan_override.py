"""InfLLM-V2 attention for torchtitan, through its override point, without changing a line of it.

With torchtitan 0.3 installed, this repository on the path, and a configuration whose
model has ``attn_backend="varlen"``:

    torchrun --nproc-per-node 8 -m torchtitan.train --module llama3 --config <one of its configs> \
        --override.imports 'scripts.torchtitan_override.sparse_attention={"dense_len": 8192}'

torchtitan packs documents; each attends by its own length, densely or sparsely.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torchtitan.config import derive, override
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata

import infllm_flex as ifx


class SparseAttention(VarlenAttention):
    """Stands where torchtitan's attention over packed documents was."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        """torchtitan's, and the settings of `InfLLMConfig` by name."""

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
        """Attend within each document; all are ``[B, S, heads, D]``, as is the result."""
        # One row of all documents behind one another, which may not cross the rows of the batch.
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
    ifx.InfLLMConfig.from_dict(settings)  # a mistake is named before the model is built
    return derive(config, SparseAttention.Config, settings=settings)
