"""Queries, keys and values to measure with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from infllm_flex.benchmarking.settings import BenchmarkSettings, Heads, Inputs

_DRIFT_TOKENS = 64  # one random vector per so many tokens, the queries between them on a line
_NOISE = 0.3


class QKV(NamedTuple):
    """Query ``[B, Hq, S, D]``, key and value ``[B, Hkv, S, D]``."""

    query: Tensor
    key: Tensor
    value: Tensor


def make_qkv(settings: BenchmarkSettings, heads: Heads, S: int, inputs: Inputs) -> QKV:
    """Draw random keys and values, and queries of the kind asked for, on the run's device.

    Args:
        settings: The run: batch, head dim, dtype, device and seed.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens.
        inputs: ``"drifting"``: neighbours ask for nearly the same, as in text.
            ``"independent"``: every query asks for something else, the worst case.
    """
    shapes, device = settings.shapes, torch.device(settings.run.device)
    dtype = getattr(torch, settings.run.dtype)
    random = torch.Generator(device).manual_seed(settings.run.seed)

    def draw(H: int, length: int) -> Tensor:
        size = (shapes.batch, H, length, shapes.head_dim)
        return torch.randn(size, generator=random, device=device)

    key, value = draw(heads.kv, S).to(dtype), draw(heads.kv, S).to(dtype)
    query = draw(heads.query, S)
    if inputs == "drifting":
        corners = draw(heads.query, S // _DRIFT_TOKENS + 2)
        at = torch.arange(S, device=device) / _DRIFT_TOKENS
        corner, way = at.long(), at.frac()[:, None]
        query *= _NOISE
        query += torch.lerp(corners[:, :, corner], corners[:, :, corner + 1], way)
    return QKV(query.to(dtype), key, value)


def with_gradients(qkv: QKV) -> QKV:
    """The same tensors as leaves that collect gradients."""
    return QKV(*(x.detach().requires_grad_() for x in qkv))
