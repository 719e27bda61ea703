"""How much of a model's dense attention block selection keeps, and how many blocks tiles load."""

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
    """Inputs of one attention layer: query ``[B, Hq, S, D]``, key ``[B, Hkv, S, D]``, scale."""

    query: Tensor
    key: Tensor
    scale: float


@dataclass(frozen=True)
class SelectionReport:
    """Dense attention of one layer and its selected blocks, over the second half of a sequence.

    Attributes:
        blocks: Mean number of blocks that a token selects.
        inflation: By tokens of a tile, the blocks that the tile loads, over ``blocks``.
        mass: Fraction of the dense attention weights in the selected blocks.
        mass_best: The same fraction in as many blocks of largest weight.
        mass_window: The same fraction in as many blocks, the first and the nearest.
        mass_single: The fraction in the 8 strongest single keys of each head, the same keys for
            all tokens, outside the blocks that are always selected.
    """

    blocks: float
    inflation: dict[int, float]
    mass: float
    mass_best: float
    mass_window: float
    mass_single: float


@contextmanager
def recorded_inputs(model: Any) -> Iterator[dict[str, LayerInputs]]:
    """Make a model attend densely inside the block, and record the inputs of its sparse layers.

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
        inputs: Queries and keys of one layer, over a whole sequence.
        config: Sparsity settings; ``dense_len`` is ignored.
        samples: Number of tokens whose dense attention is computed.
        seed: Seed of their choice.

    Raises:
        ValueError: Tokens of the second half of the sequence see no more keys than their budget.
    """
    query, key, scale = inputs
    S, half = query.shape[2], query.shape[2] // 2
    budget = config.budget_tokens
    if half < budget:
        raise ValueError(
            f"the second half must lie beyond the budget of {budget} tokens, within which all keys "
            f"are selected; got {S} tokens: take at least {2 * budget}, or fewer blocks"
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
    """Return dense attention weights by block ``[B, Hkv, n, Nkv]``, and the mass of single keys.

    Weights are averaged over the group. One KV head at a time, since the weights of all keys need
    much memory.
    """
    S, groups = key.shape[2], group_size(query.shape[1], key.shape[1])
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
