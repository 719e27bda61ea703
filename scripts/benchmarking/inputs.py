"""Random queries, keys and values of the benchmark."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarking.settings import BenchmarkSettings, Heads, Inputs


class _Drift(NamedTuple):
    """How similar queries are.

    Attributes:
        tokens: Distance of the random vectors between which queries are interpolated.
        noise: Scale of the independent part of each query.
        common: Fraction of the variance that the heads of a group have in common.
    """

    tokens: int
    noise: float
    common: float


# "text" is fitted to a code model with 16 query heads per KV head, trained at 16K tokens, by the
# number of blocks that tiles of 2 to 32 tokens hold; tests/benchmarking/test_inputs.py checks it.
_DRIFTS = {"drifting": _Drift(64, 0.3, 0.0), "text": _Drift(256, 0.53, 0.5)}


class QKV(NamedTuple):
    """Query ``[B, Hq, S, D]``, key and value ``[B, Hkv, S, D]``."""

    query: Tensor
    key: Tensor
    value: Tensor


def make_qkv(
    settings: BenchmarkSettings,
    heads: Heads,
    S: int,
    inputs: Inputs,
    *,
    num_queries: int | None = None,
) -> QKV:
    """Draw random keys and values, and queries of one kind, on the run's device.

    Args:
        settings: The run: batch, head dim, dtype, device and seed.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens.
        inputs: ``"text"``: neighbouring queries, and the heads of a group, are as similar as those
            of a model trained on text. ``"drifting"``: neighbouring queries are similar, heads are
            independent. ``"independent"``: all queries are independent, the worst case.
        num_queries: Number of queries, those of the last tokens; None: one for each token.
    """
    shapes, device = settings.shapes, torch.device(settings.run.device)
    dtype = getattr(torch, settings.run.dtype)
    random = torch.Generator(device).manual_seed(settings.run.seed)

    def draw(H: int, length: int) -> Tensor:
        size = (shapes.batch, H, length, shapes.head_dim)
        return torch.randn(size, generator=random, device=device)

    key, value = draw(heads.kv, S).to(dtype), draw(heads.kv, S).to(dtype)
    n = S if num_queries is None else num_queries
    query = draw(heads.query, n)
    if inputs != "independent":
        drift = _DRIFTS[inputs]
        num_knots = S // drift.tokens + 2
        knots = draw(heads.query, num_knots)
        if drift.common:
            shared = draw(heads.kv, num_knots).repeat_interleave(heads.query // heads.kv, 1)
            knots = (1 - drift.common) ** 0.5 * knots + drift.common**0.5 * shared
        place = torch.arange(S - n, S, device=device) / drift.tokens
        before, weight = place.long(), place.frac()[:, None]
        query *= drift.noise
        query += torch.lerp(knots[:, :, before], knots[:, :, before + 1], weight)
    return QKV(query.to(dtype), key, value)


def with_gradients(qkv: QKV) -> QKV:
    """Return the same tensors as leaves that collect gradients."""
    return QKV(*(x.detach().requires_grad_() for x in qkv))
