"""Inputs and weights of a model with random weights, whose attention behaves as if trained.

Random weights give neighbouring tokens unrelated queries, so a tile of tokens selects almost as
many different blocks as its tokens together: the worst case. In a model trained on text the
residual stream, and with it queries and keys, changes slowly along the tokens. `make_text_like` and
`text_like_embeddings` construct that: the embeddings drift along the tokens, the layers add little
to them, so that all layers see the drift, and the heads of a group have half of their queries in
common. `evaluation.tile_overlap` measures what tiles load.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

# Fitted to SmolLM2-135M on text, by the blocks that tiles of 2 to 32 tokens load;
# tests/benchmarking/test_activations.py holds the fit.
_KNOT_TOKENS = 128  # distance of the random vectors between which embeddings are interpolated
_NOISE = 0.225  # scale of the independent part of an embedding
_COMMON = 0.5  # fraction of the variance of queries that the heads of a group have in common
_ADDED = 0.02  # what a layer adds to the residual stream, relative to usual weights

_QUERY = re.compile(r"\.q_proj\.weight$")
_KEY = re.compile(r"\.k_proj\.weight$")
_OUTPUT = re.compile(r"\.(o_proj|down_proj)\.weight$")


@torch.no_grad()
def make_text_like(model: nn.Module, num_kv_heads: int, head_dim: int, seed: int) -> None:
    """Draw query and key weights anew, and shrink what layers add to the residual stream.

    Args:
        model: A Llama-like model whose layers have ``q_proj``, ``k_proj``, ``o_proj`` and
            ``down_proj``.
        num_kv_heads: Key/value heads.
        head_dim: ``D``.
        seed: Seed of the weights.

    Raises:
        ValueError: The model has no such layers.
    """
    drawn = 0
    random: torch.Generator | None = None
    for name, weight in model.named_parameters():
        if random is None:
            random = torch.Generator(weight.device).manual_seed(seed)
        if _OUTPUT.search(name):
            weight.mul_(_ADDED)
        if not (_QUERY.search(name) or _KEY.search(name)):
            continue
        drawn += 1
        # Queries and keys of unit variance: random weights of a narrow model give all keys
        # almost the same score.
        spread = weight.shape[1] ** -0.5
        weight.normal_(std=spread, generator=random)
        if _QUERY.search(name):
            by_group = weight.view(num_kv_heads, -1, head_dim, weight.shape[1])
            shared = torch.empty_like(by_group[:, :1]).normal_(std=spread, generator=random)
            by_group.mul_((1 - _COMMON) ** 0.5).add_(shared, alpha=_COMMON**0.5)
    if not drawn:
        raise ValueError(
            f"expected a model with layers q_proj and k_proj, got a {type(model).__name__}: "
            "measure it with activations: [random]"
        )


def text_like_embeddings(
    batch: int, length: int, width: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Tensor:
    """Draw embeddings ``[batch, length, width]`` of unit variance that drift along the tokens."""
    random = torch.Generator(device).manual_seed(seed)
    rows = []
    for _ in range(batch):
        size = (length // _KNOT_TOKENS + 2, width)
        knots = torch.randn(size, generator=random, device=device).to(dtype)
        place = torch.arange(length, device=device) / _KNOT_TOKENS
        before, weight = place.long(), place.frac()[:, None].to(dtype)
        drift = torch.lerp(knots[before], knots[before + 1], weight)
        noise = torch.empty_like(drift).normal_(generator=random)
        rows.append(drift.add_(noise, alpha=_NOISE))
    return torch.stack(rows)


def random_embeddings(model: Any, batch: int, length: int, seed: int) -> Tensor:
    """Embed random tokens: ``[batch, length, width]``."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    random = torch.Generator(device).manual_seed(seed)
    size, vocabulary = (batch, length), embedding.weight.shape[0]
    with torch.no_grad():
        return embedding(torch.randint(vocabulary, size, generator=random, device=device))
