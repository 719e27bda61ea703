"""Refusals: each case that the plugin does not serve is named when a model is loaded."""

from __future__ import annotations

from typing import NamedTuple

from infllm_flex.decoding import FEW_QUERIES
from infllm_flex.patch.settings import Resolved
from infllm_flex.vllm.page_layout import extra_share, smallest_page
from infllm_flex.vllm.settings import STAY_DENSE

# Draft tokens that need no model: their layers' attention would be that of the served model.
_MODEL_FREE_DRAFTS = (None, "ngram", "ngram_gpu", "suffix")


class ServerFacts(NamedTuple):
    """The settings of vLLM that matter here.

    Attributes:
        uses_mla: Whether the model has latent attention.
        has_encoder: Whether the model is an encoder, or has one whose output its decoder reads.
        has_other_layers: Whether the model has layers that keep a state instead of keys.
        full_layers: Whether any layer attends to all earlier tokens.
        cache_dtype: Dtype of keys and values; ``auto`` is the model's own.
        model_dtype: The model's own, such as ``bfloat16``.
        page_size: Tokens of a page; None where vLLM asks the backend for it later.
        attention_backend: The user's choice for layers that see all earlier tokens, or None.
        tensor_parallel: Processes among which heads are divided.
        kv_heads: Key/value heads of the layer that has fewest.
        context_parallel: Processes that share one sequence.
        moves_pages: Whether pages are copied to other machines or memory.
        drafts: The method that drafts tokens, or None.
        ahead: Draft tokens of a step that vLLM schedules before it knows how many of the step
            before were accepted.
    """

    uses_mla: bool
    has_encoder: bool
    has_other_layers: bool
    full_layers: bool
    cache_dtype: str
    model_dtype: str
    page_size: int | None
    attention_backend: str | None
    tensor_parallel: int
    kv_heads: int
    context_parallel: int
    moves_pages: bool
    drafts: str | None
    ahead: int


class LayerFacts(NamedTuple):
    """Features that a layer asks of its attention beyond a causal softmax.

    Attributes:
        alibi: Whether scores have a bias by distance.
        soft_cap: Whether scores are capped.
        sinks: Whether the softmax has attention sinks.
        window: Whether the layer sees a sliding window.
        kind: vLLM's attention type, such as ``decoder``.
        shares_cache: Whether the layer reads another layer's keys.
        others: Names of further arguments.
    """

    alibi: bool
    soft_cap: bool
    sinks: bool
    window: bool
    kind: str
    shares_cache: bool
    others: tuple[str, ...]


def check_server(facts: ServerFacts, served: Resolved) -> None:
    """Refuse what cannot be served with these settings.

    Raises:
        ValueError: The first reason, with what to do instead.
    """
    reason = _server_reason(facts)
    if reason is not None:
        raise ValueError(not_served(reason))
    # vLLM will ask for a page size that fits where none is known.
    page_size = facts.page_size or smallest_page(served.config)
    try:
        extra_share(served.config, page_size)
    except NotImplementedError as error:
        raise ValueError(f"InfLLM-V2 in vLLM: {error} ({served.origin}); {STAY_DENSE}") from None
    except ValueError as error:
        raise ValueError(f"--block-size does not fit the settings: {error}") from None


def check_layer(facts: LayerFacts) -> None:
    """Refuse a layer whose attention is more than a causal softmax.

    Raises:
        ValueError: The first reason, with what to do instead.
    """
    for applies, reason in (
        (facts.alibi, "layers with ALiBi"),
        (facts.soft_cap, "layers with a soft cap on scores"),
        (facts.sinks, "layers with attention sinks"),
        (facts.window, "layers with a sliding window: vLLM's own backend does"),
        (facts.kind != "decoder", f"{facts.kind} attention"),
        (facts.shares_cache, "layers that read another layer's keys: they have none to score"),
        (bool(facts.others), f"layers that ask for {', '.join(facts.others)}"),
    ):
        if applies:
            raise ValueError(not_served(reason))


def not_served(reason: str) -> str:
    """The line that refuses something, with what to do instead."""
    return f"InfLLM-V2 does not serve {reason}; {STAY_DENSE}"


def _server_reason(facts: ServerFacts) -> str | None:
    """The first reason against a server, or None."""
    if facts.uses_mla:
        return "latent attention (MLA)"
    if facts.has_encoder:
        return "encoders and models with one"
    if facts.has_other_layers:
        return "models with layers that keep a state instead of keys"
    if not facts.full_layers:
        return "models without keys to score: no layer attends to all earlier tokens"
    if facts.cache_dtype not in ("auto", facts.model_dtype):
        return f"a cache in {facts.cache_dtype}: leave out --kv-cache-dtype"
    if facts.attention_backend is not None:
        return (
            f"layers by the attention backend {facts.attention_backend}: leave the choice out, if "
            "it is not vLLM's own for this model (one for windowed layers alone goes into "
            "--attention-config, backend_per_kind)"
        )
    if facts.tensor_parallel > facts.kv_heads:
        return (
            f"{facts.kv_heads} key/value heads in {facts.tensor_parallel} processes: the query "
            "heads of one select blocks together, in one process "
            f"(--tensor-parallel-size {facts.kv_heads} at most)"
        )
    if facts.context_parallel > 1:
        return f"context parallelism, got {facts.context_parallel} processes for a sequence"
    if facts.moves_pages:
        return "KV connectors and offloading: they may leave compressed keys behind"
    if facts.drafts not in _MODEL_FREE_DRAFTS:
        return f"drafts by {facts.drafts}: of speculative methods, ngram and suffix are served"
    if facts.ahead >= FEW_QUERIES:
        return (
            f"{facts.ahead} draft tokens with asynchronous scheduling: take at most "
            f"{FEW_QUERIES - 1}, or --no-async-scheduling"
        )
    return None
