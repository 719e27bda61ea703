"""Queries, keys and values to measure with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarking.settings import BenchmarkSettings, Heads, Inputs


class _Drift(NamedTuple):
    """How fast queries drift, how much each is its own, and how much a group's heads share."""

    tokens: int  # one random vector per so many, the queries between them on a line
    noise: float
    common: float


# "text" is fitted to a code model (120M parameters, 16 heads per KV head, trained at 16K tokens).
# With 64 blocks a token, tiles of 2, 4, 8, 16 and 32 tokens hold 1.16, 1.29, 1.42, 1.54 and 1.66
# times as many in the second half there, and 1.16, 1.30, 1.43, 1.55 and 1.66 here. A drift of 64
# tokens fits tiles of up to 8 as well, but reaches 1.57 and 1.81.
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
    """Draw random keys and values, and queries of the kind asked for, on the run's device.

    Args:
        settings: The run: batch, head dim, dtype, device and seed.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens.
        inputs: ``"text"``: neighbours, and the heads of a group, ask for as much the same as those
            of a model trained on text. ``"drifting"``: every head drifts on its own.
            ``"independent"``: every query asks for something else, the worst case.
        num_queries: How many tokens, the last ones, have a query; all by default.
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
        num_corners = S // drift.tokens + 2
        corners = draw(heads.query, num_corners)
        if drift.common:
            shared = draw(heads.kv, num_corners).repeat_interleave(heads.query // heads.kv, 1)
            corners = (1 - drift.common) ** 0.5 * corners + drift.common**0.5 * shared
        at = torch.arange(S - n, S, device=device) / drift.tokens
        corner, way = at.long(), at.frac()[:, None]
        query *= drift.noise
        query += torch.lerp(corners[:, :, corner], corners[:, :, corner + 1], way)
    return QKV(query.to(dtype), key, value)


def with_gradients(qkv: QKV) -> QKV:
    """The same tensors as leaves that collect gradients."""
    return QKV(*(x.detach().requires_grad_() for x in qkv))
