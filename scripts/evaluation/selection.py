"""What block selection keeps of a model's dense attention, and what tiles of tokens load for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import dense
from infllm_flex.patch.huggingface import patched_layers
from infllm_flex.selection import select_blocks
from infllm_flex.validation import resolve_scale
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.sizes import group_size

_SINGLE_KEYS = 8
_TILE_TOKENS = (2, 4, 8, 16, 32)


class LayerInputs(NamedTuple):
    """What one attention layer was called with: ``[B, Hq, S, D]`` and ``[B, Hkv, S, D]``."""

    query: Tensor
    key: Tensor
    scale: float


@dataclass(frozen=True)
class SelectionReport:
    """How one layer would fare with selected blocks, over the second half of a sequence.

    Attributes:
        blocks: Blocks that a token selects, on average.
        inflation: Blocks that a tile of so many tokens loads, over ``blocks``.
        mass: Share of the dense attention weights that lies in the selected blocks.
        mass_best: The same for as many blocks chosen with the weights known.
        mass_window: The same for the first block and the nearest, as many in all.
        mass_single: The share in the 8 strongest single keys of each head, the same for all tokens,
            outside the blocks that are always selected.
    """

    blocks: float
    inflation: dict[int, float]
    mass: float
    mass_best: float
    mass_window: float
    mass_single: float


@contextmanager
def recorded_inputs(model: Any) -> Iterator[dict[str, LayerInputs]]:
    """Inside the block the model attends densely, and sparse layers leave their last inputs.

    `attend_through` is no substitute: it refuses models with windowed layers, and replaces what the
    model's own function does with masks and soft caps.

    Args:
        model: A patched transformers model.
    """
    inputs: dict[str, LayerInputs] = {}
    layers = {n: layer for n, layer in patched_layers(model).items() if layer.skip_reason is None}
    originals = {name: layer.dense_attention for name, layer in layers.items()}

    def recorder(name: str, original: Any) -> Any:
        def attend(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            scale = resolve_scale(query, kwargs.get("scaling"))
            inputs[name] = LayerInputs(query.detach(), key.detach(), scale)
            return original(module, query, key, *args, **kwargs)

        return attend

    try:
        for name, layer in layers.items():
            layer.dense_attention = {
                how: recorder(name, original) for how, original in originals[name].items()
            }
        with dense(model):
            yield inputs
    finally:
        for name, layer in layers.items():
            layer.dense_attention = originals[name]


@torch.no_grad()
def judge_selection(
    inputs: LayerInputs, config: InfLLMConfig, *, samples: int = 256, seed: int = 0
) -> SelectionReport:
    """Compare selected blocks with dense attention.

    Args:
        inputs: Queries and keys of one layer, of a whole sequence.
        config: Sparsity settings; ``dense_len`` plays no part.
        samples: Tokens whose dense attention is looked at.
        seed: Of their choice.

    Raises:
        ValueError: The second half of the sequence has tokens that see no more than their budget.
    """
    query, key, scale = inputs
    S, half = query.shape[2], query.shape[2] // 2
    budget = config.num_selected * config.block_size
    if half < budget:
        raise ValueError(
            f"the second half must lie beyond the budget of {budget} tokens, where all is seen; "
            f"got {S} tokens: take at least {2 * budget}, or fewer blocks"
        )
    selected = select_blocks(query[:, :, half:], key, config, scale=scale)
    blocks = (selected >= 0).sum(-1).float().mean().item()
    inflation = {
        tokens: union_lists.list_blocks(selected, S, config.block_size, tokens)[0]
        .float()
        .mean()
        .item()
        / blocks
        for tokens in _TILE_TOKENS
    }
    random = torch.Generator().manual_seed(seed)
    at = torch.randperm(S - half, generator=random)[:samples].to(query.device)
    sampled = query[:, :, half:][:, :, at]
    mass, single = _block_mass(sampled, key, at + half, scale, config)
    own = ((at + half) // config.block_size)[:, None]
    block = torch.arange(mass.shape[-1], device=mass.device)
    near = (block < config.init_blocks) | (block > own - config.num_selected + config.init_blocks)
    chosen = torch.zeros(*mass.shape[:-1], mass.shape[-1] + 1, device=mass.device)
    slots = selected[:, :, at].long()
    chosen.scatter_(-1, slots.masked_fill(slots < 0, mass.shape[-1]), 1.0)
    return SelectionReport(
        blocks=blocks,
        inflation=inflation,
        mass=(mass * chosen[..., :-1]).sum(-1).mean().item(),
        mass_best=mass.topk(config.num_selected, -1).values.sum(-1).mean().item(),
        mass_window=(mass * (near & (block <= own))).sum(-1).mean().item(),
        mass_single=single,
    )


def _block_mass(
    query: Tensor, key: Tensor, position: Tensor, scale: float, config: InfLLMConfig
) -> tuple[Tensor, float]:
    """Dense attention weights, summed by block and averaged over the group: ``[B, Hkv, n, Nkv]``.

    And the share of single keys outside the forced blocks. A KV head at a time, since weights of
    all keys are made.
    """
    S, groups = key.shape[2], group_size(query, key)
    hidden = torch.arange(S, device=key.device) > position[:, None]
    block = torch.arange(S, device=key.device) // config.block_size
    own = (position // config.block_size)[:, None]
    forced = (block < config.init_blocks) | (block >= own - config.local_blocks)
    mass, single = [], []
    for heads, keys in zip(query.split(groups, 1), key.float().split(1, 1), strict=True):
        logits = heads.float() @ keys.mT * scale  # [B, G, n, S]
        by_head = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        between = by_head.masked_fill(forced, 0.0).mean(2)  # over the tokens: [B, G, S]
        single.append(between.topk(min(_SINGLE_KEYS, S)).values.sum(-1).mean())
        weights = by_head.mean(1)
        padded = torch.nn.functional.pad(weights, (0, -S % config.block_size))
        mass.append(padded.unflatten(-1, (-1, config.block_size)).sum(-1))
    return torch.stack(mass, 1), torch.stack(single).mean().item()
