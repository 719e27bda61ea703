"""The model to train."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infllm_flex.strict_yaml import check_range

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_llama_sizes(sizes: Any) -> None:
    """Check the sizes of a Llama-style model.

    Args:
        sizes: Settings with the size fields of `TinyModelSettings`.

    Raises:
        ValueError: A size is out of range, or sizes do not divide each other.
    """
    for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads"):
        check_range(name, getattr(sizes, name), 1, 65536)
    head_dim = getattr(sizes, "head_dim", None)
    if head_dim is not None:
        check_range("head_dim", head_dim, 2, 256)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}")
        if sizes.hidden_size % sizes.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads = {sizes.num_heads}, "
                f"got {sizes.hidden_size}"
            )
    elif sizes.hidden_size % (2 * sizes.num_heads):
        raise ValueError(
            f"hidden_size must be a multiple of twice num_heads = {2 * sizes.num_heads}, "
            f"got {sizes.hidden_size}"
        )
    if sizes.num_heads % sizes.num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads = {sizes.num_kv_heads}, "
            f"got {sizes.num_heads}"
        )


@dataclass(frozen=True, kw_only=True)
class TinyModelSettings:
    """A Llama-style model with random weights and one token per byte.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width, a multiple of ``num_heads``, and of twice that without ``head_dim``.
        intermediate_size: Width of the feed-forward layers.
        num_heads: Query heads, a multiple of ``num_kv_heads``.
        num_kv_heads: Key/value heads.
        head_dim: Elements of a head; None: ``hidden_size`` over ``num_heads``.
        rope_theta: Base of the rotary embedding.
    """

    num_layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 336
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        check_llama_sizes(self)
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model to train: exactly one of ``path``, ``hub`` and ``tiny``.

    Attributes:
        path: A local transformers folder with ``config.json`` and safetensors weights. Nothing is
            downloaded and no code of the folder is run.
        hub: Name of a model on the Hugging Face hub, such as ``Qwen/Qwen3-8B``, read from the local
            cache.
        revision: Commit, tag or branch of the model on the hub.
        download: Whether to download files that are not in the cache.
        tiny: A small model with random weights.
        dtype: Dtype of the weights, their gradients and the optimizer state.
        arithmetic: Dtype of matrix products. ``weights``: that of the weights. ``bfloat16`` with
            float32 weights is usual for fine-tuning on a GPU.
        float8: Whether the products of the decoder layers are in float8, on GPUs with float8.
    """

    path: Path | None = None
    hub: str | None = None
    revision: str = "main"
    download: bool = False
    tiny: TinyModelSettings | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    arithmetic: Literal["weights", "bfloat16"] = "weights"
    float8: bool = False

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.path, self.hub, self.tiny)) != 1:
            raise ValueError("exactly one of path, hub and tiny must be given")
        if self.hub is not None and not _HUB_NAME.fullmatch(self.hub):
            raise ValueError(f"hub must be a name such as Qwen/Qwen3-8B, got {self.hub!r}")
        if self.hub is None and (self.download or self.revision != "main"):
            setting = "download" if self.download else "revision"
            raise ValueError(f"{setting} must not be set without hub: it has no effect")
        if self.path is None:
            return
        if not self.path.is_dir():
            raise ValueError(f"path must be an existing local folder, got {self.path}")
        if not (self.path / "config.json").is_file():
            raise ValueError(f"path must hold a config.json, {self.path} has none")
        if not any(self.path.glob("*.safetensors")):
            raise ValueError(f"path must hold *.safetensors weights, {self.path} has none")
