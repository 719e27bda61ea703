"""A control without selection: forced blocks, and random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_flex.attention import infllm_attention
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.layer_state import Attend
from infllm_flex_ops.sizes import ceil_div

_MASK = 0x7FFFFFFF


class RandomBlocks:
    """Attention to the forced blocks of each query, and to random ones up to its budget.

    The blocks are a function of seed, layer, head and position only. Hence they are the same when a
    layer is recomputed, in a cache, and for queries in chunks. Supports one sequence per row,
    without padding.

    Args:
        config: Budget and forced blocks.
        seed: Seed of the random blocks.
    """

    def __init__(self, config: InfLLMConfig, seed: int = 0) -> None:
        self._config, self._seed = config, seed

    def __call__(self, layer: int) -> Attend:
        """Return the attention of a layer, in the form of `infllm_flex.patch.attend_through`."""
        config, seed = self._config, self._seed * 1_000_003 + layer

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
            if config.is_dense(key.shape[2]):
                return infllm_attention(query, key, value, config, scale=scale)
            selected = select_at_random(query, key, config, seed)
            return infllm_attention(query, key, value, config, scale=scale, selected=selected)

        return attend


def select_at_random(query: Tensor, key: Tensor, config: InfLLMConfig, seed: int) -> Tensor:
    """Select blocks independently of the values of queries and keys.

    The visible blocks that are not forced are cut into as many ranges as the budget leaves, and one
    block of each range is drawn uniformly.

    Args:
        query: ``[B, Hq, Sq, D]``, the last ``Sq`` positions.
        key: ``[B, Hkv, Skv, D]``.
        config: Sparsity settings.
        seed: Seed of the draws.

    Returns:
        int32 ``[B, Hkv, Sq, K]``, ascending, in the form of `select_blocks`.
    """
    (B, _, Sq, _), (_, heads, Skv, _) = query.shape, key.shape
    init, local = config.init_blocks, config.local_blocks
    slots = min(config.num_selected, ceil_div(Skv, config.block_size))
    free = config.num_selected - init - local - 1
    position = torch.arange(Skv - Sq, Skv, device=key.device)
    own = (position // config.block_size)[None, :, None]  # [1, Sq, 1]
    slot = torch.arange(slots, device=key.device)  # [K]
    head = torch.arange(heads, device=key.device)[:, None, None]  # [Hkv, 1, 1]
    between = (own - local - init).clamp_min(0)
    place = slot - init
    first = init + place * between // max(free, 1)
    size = init + (place + 1) * between // max(free, 1) - first
    chance = _hash(_hash(_hash(position[None, :, None] + seed * 69_069) ^ slot) ^ (head + 1))
    drawn = first + chance % size.clamp_min(1)
    chosen = torch.where(slot < init, slot, drawn)
    chosen = torch.where(slot >= init + free, own - local + slot - init - free, chosen)
    all_seen = own < config.num_selected
    everything = torch.where(slot <= own, slot, -1)
    chosen = torch.where(all_seen, everything, chosen).int()  # [Hkv, Sq, K]
    return chosen.expand(B, heads, Sq, slots).contiguous()


def _hash(number: Tensor) -> Tensor:
    """Hash integers to 31 bits; products stay below 2**62."""
    number = number & _MASK
    number = (number ^ (number >> 15)) * 0x2C1B3C6D & _MASK
    number = (number ^ (number >> 12)) * 0x297A2D39 & _MASK
    return number ^ (number >> 15)
