"""The compressed keys that a cache's layer carries, and the keys that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import CompressedKeys
from infllm_flex.selection import dtype_of_compressed
from infllm_flex_ops import torch_private


@dataclass
class CacheState:
    """The compressed keys of a cache layer, and the keys that they belong to.

    Attributes:
        compressed_keys: Compressed keys of the slots taken in so far.
        keys: The tensor of keys that they belong to. A layer that holds another was changed in a
            way that was not tracked.
        no_padding: Zero, the first slot where no row is padded; made once, not at every step.
        num_slots: Number of slots taken in; not kept for static caches.
        version: Count of writes to ``keys`` by then; None in inference mode, which has no count.
    """

    compressed_keys: CompressedKeys
    keys: Tensor
    no_padding: Tensor
    num_slots: int = 0
    version: int | None = None

    @classmethod
    def begin(cls, config: InfLLMConfig, key: Tensor, keys: Tensor) -> CacheState:
        """The empty state of a cache layer that holds ``keys``, and returned them as ``key``."""
        no_padding = torch.zeros(1, dtype=torch.int64, device=key.device)
        return cls(CompressedKeys(config, key), keys, no_padding)

    def bind(self, keys: Tensor) -> None:
        """Note that the compressed keys are those of ``keys`` as they are now."""
        self.keys, self.version = keys, _version(keys)

    def is_bound_to(self, keys: Tensor | None, changes: int = 0) -> bool:
        """Whether they are those of ``keys``, after at most so many writes in place."""
        if self.keys is not keys:
            return False
        now = _version(self.keys)
        if now is None or self.version is None:
            return now is self.version
        return 0 <= now - self.version <= changes

    def serves(self, key: Tensor, config: InfLLMConfig) -> bool:
        """Whether they have these settings, and the dtype that attention casts ``key`` to."""
        keys = self.compressed_keys
        same = keys.config is config or keys.config == config  # comparing takes microseconds
        return same and keys.compressed.dtype == dtype_of_compressed(key, keys.config)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as None, because a copied layer holds another tensor."""
        return type(None), ()


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else torch_private.write_count(x)
