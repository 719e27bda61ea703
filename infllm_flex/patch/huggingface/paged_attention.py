"""Sparse attention in transformers' continuous batching: new tokens of many requests over pages.

The cache hands over the keys of all requests, gathered from their pages and one behind the other.
Which of them are whole prompts, parts of prompts or single tokens changes from step to step, so
each query is dense or sparse by its own position.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infllm_flex.chunks import attend_chunk
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import CompressedKeys, decode_attention
from infllm_flex.patch.huggingface.cached_attention import FEW
from infllm_flex.patch.huggingface.transformers_private import paged_step
from infllm_flex.patch.running_forward import recall

_log = logging.getLogger(__name__)


class Request(NamedTuple):
    """The tokens of one request, among those of all requests of a step."""

    queries: slice
    keys: slice


def read_requests(kwargs: Mapping[str, Any]) -> list[Request]:
    """Find the requests of a step. Waits for the device once per forward pass.

    Args:
        kwargs: Keywords of the attention function.
    """
    step = paged_step(kwargs)
    bounds = step.query_bounds, step.key_bounds

    def read() -> list[Request]:
        queries, keys = ([slice(*each) for each in pairwise(x.tolist())] for x in bounds)
        both = zip(queries, keys, strict=True)
        # Padded steps have empty requests at the end.
        return [Request(*each) for each in both if each[0].start < each[0].stop]

    return recall("requests", bounds, read)


@functools.cache
def warn_of_other_rule(config: InfLLMConfig) -> None:
    """Log once where requests are not attended as a whole prompt of the model would be."""
    if config.dense_by == "sequence" and config.longest_dense > config.budget_tokens:
        _log.warning(
            "continuous batching is dense up to position %d of each request, while dense_by = "
            "'sequence' makes a whole prompt of %d tokens or more sparse from position %d on: set "
            "dense_by = 'position' to have the same everywhere",
            config.longest_dense - 1,
            config.dense_len,
            config.budget_tokens,
        )


def attend_requests(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    requests: list[Request],
    config: InfLLMConfig,
    scale: float | None,
) -> Tensor:
    """Attend within each request, from each query by its own position.

    Args:
        query: ``[1, Hq, Sq, D]``, the last tokens of every request.
        key: ``[1, Hkv, Skv, D]``, all tokens of every request.
        value: ``[1, Hkv, Skv, D]``.
        requests: Their tokens, in order.
        config: Sparsity settings.
        scale: Factor on the dot products; None for ``D ** -0.5``.

    Returns:
        ``[1, Hq, Sq, D]``, zero for queries of no request.
    """
    parts = [
        _attend_alone(
            query[:, :, request.queries],
            key[:, :, request.keys],
            value[:, :, request.keys],
            config,
            scale,
        )
        for request in requests
    ]
    num_unused = query.shape[2] - requests[-1].queries.stop
    return torch.cat([*parts, query.new_zeros(*query.shape[:2], num_unused, query.shape[3])], 2)


def _attend_alone(
    query: Tensor, key: Tensor, value: Tensor, config: InfLLMConfig, scale: float | None
) -> Tensor:
    length = key.shape[2]
    if query.shape[2] > FEW or config.is_dense(length):
        return attend_chunk(query, key, value, config, scale=scale)
    compressed_keys = CompressedKeys(config, key)
    compressed_keys.append(key, length)
    return decode_attention(query, key, value, compressed_keys, scale=scale)
