"""Why an attention layer stays dense: the words, and what a user can do about each.

`describe` prints these reasons, errors quote them, and the advice follows in errors.
"""

from __future__ import annotations

from collections.abc import Iterable

NOT_CAUSAL = "not causal"
CROSS_ATTENTION = "cross-attention"
OTHER_SEQUENCE = "keys of another sequence, and no cache"
UNDECLARED = "neither is_causal nor a cache"
TOWER = "no cache, unlike the language model"
# Reasons of layers that do not attend causally to their own sequence.
OTHER_ATTENTION = (NOT_CAUSAL, CROSS_ATTENTION, OTHER_SEQUENCE, UNDECLARED, TOWER)
SINKS = "learned attention sinks"
OWN_INDEXER = "the model's own sparse indexer"
OTHER_KEYS = "keys of another model"
LEARNED_MASK = "a mask that the layer learns"
POSITION_BIAS = "a position bias on its logits"
CHUNKED = "chunked attention"
FORWARD_ON_INSTANCE = "a forward set on the instance: patch before that"


def sliding_window(size: object) -> str:
    """A layer whose queries see only the last ``size`` keys."""
    return f"sliding window {size}"


def soft_capped(cap: float) -> str:
    """A layer that bounds its logits by ``cap * tanh(logits / cap)``."""
    return f"logits soft-capped at {cap:g}"


_ONLY_CAUSAL = "only causal self-attention can be sparse"
_DENSE = "such a model stays dense"
_NOTHING_ADDED = f"sparse attention adds nothing to its logits: {_DENSE}"
_SPARSE_ALREADY = "the model selects its keys itself: it is sparse already"
# A reason begins with the key.
_ADVICE = {
    "sliding window": "a window over the keys stays dense; where the model may attend to all of "
    "them, build it with sliding_window=None, or with 'full_attention' among its layer_types",
    NOT_CAUSAL: _ONLY_CAUSAL,
    CROSS_ATTENTION: _ONLY_CAUSAL,
    OTHER_SEQUENCE: _ONLY_CAUSAL,
    UNDECLARED: "an encoder stays dense; set is_causal = True on a layer that is causal, before "
    "patching",
    TOWER: "a vision or audio tower stays dense",
    "logits soft-capped": "sparse attention caps no logits; where the model may do without, set "
    "the cap to None in its config",
    SINKS: f"sparse attention has no sinks: {_DENSE}",
    "a position bias": _NOTHING_ADDED,
    "a mask that": _NOTHING_ADDED,
    "values of": f"sparse attention needs values as wide as keys: {_DENSE}",
    "heads of": "sparse attention serves heads of up to 256: wider ones stay dense",
    OTHER_KEYS: "a drafter stays dense: patch the model that it drafts for",
    "indexed attention": _SPARSE_ALREADY,
    OWN_INDEXER: _SPARSE_ALREADY,
    "a forward set on the instance": "remove it before patching, or call "
    "infllm_flex.infllm_attention in it",
    "attn_implementation=": "call model.set_attn_implementation('sdpa') before patching",
}


def advice_for(reasons: Iterable[str]) -> list[str]:
    """Advice on some reasons, each piece once."""
    found = (advice for r in reasons for start, advice in _ADVICE.items() if r.startswith(start))
    return list(dict.fromkeys(found))
