"""Whether the mask of a call says "causal", and how many keys there are to see."""

from __future__ import annotations

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.validation import has_values, is_recorded

_HIDDEN = -1e4  # additive masks hide by -inf, by the least number, or by some large one
_ENTRIES_AT_ONCE = 2**24  # entries of a mask, looked at together
_NOT_CAUSAL = (
    "an attention mask beyond plain causal (padding, packed documents, a window, ALiBi or another "
    "bias): sparse attention serves plain causal sequences here; run it inside "
    "infllm_flex.dense(model), or call infllm_flex.infllm_attention in the model's own code"
)
_REFUSAL = f"the model passes {_NOT_CAUSAL}"


def count_visible_keys(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> int:
    """Count the keys that the last query sees, which are the first ones.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``, longer where a cache is preallocated.
        mask: ``[..., Sq, Skv]``, bool (True: seen) or additive, or None.
        is_causal: As SDPA takes it: the first query sees the first key alone.

    Raises:
        UnsupportedModelError: The mask is not that of the last ``Sq`` of some first keys.
    """
    q_len, kv_len = query.shape[-2], key.shape[-2]
    if mask is None:
        return q_len if is_causal else kv_len
    if _is_causal_bias(mask):  # no tensor of numbers: its kind and shape say all
        return q_len if mask.variant.name == "UPPER_LEFT" else kv_len  # type: ignore[attr-defined]
    if torch.compiler.is_compiling():
        if q_len != kv_len:
            raise UnsupportedModelError(
                f"{q_len} queries of {kv_len} keys under a mask, a preallocated cache, cannot be "
                "served by torch.compile at sparse length: decode without it, or compile inside "
                "infllm_flex.dense(model)"
            )
        return kv_len  # `assert_causal` puts the check into the graph
    visible = _visible(mask)
    last = int(visible[..., -1, :].sum(-1).max())
    if last < q_len or not bool(_is_causal_prefix(visible, last, q_len)):
        raise UnsupportedModelError(_REFUSAL)
    return last


def assert_causal(query: Tensor, mask: Tensor | None) -> Tensor:
    """Put the check of a mask into a graph that is being compiled, where it cannot be read.

    Returns:
        ``query``, whose values depend on the check, so that no pass takes it out.
    """
    if mask is None or _is_causal_bias(mask) or not torch.compiler.is_compiling():
        return query
    visible = _visible(mask)
    plain = _is_causal_prefix(visible, visible.shape[-1], visible.shape[-2])
    return query + infllm_flex_ops.zero_if(plain, _REFUSAL).to(query.dtype)


def assert_equal_mask(query: Tensor, mask: Tensor, expected: Tensor) -> Tensor:
    """Raise unless a mask shows what is expected; in a graph, put the check into it.

    Args:
        query: ``[B, Hq, S, D]``.
        mask: ``[..., S, S]`` as SDPA takes it.
        expected: bool ``[B, 1, S, S]``.

    Returns:
        ``query``; in a graph its values depend on the check.

    Raises:
        UnsupportedModelError: The mask shows anything else.
    """
    equal = (_visible(mask) == expected).all()
    if is_recorded(query):
        return query + infllm_flex_ops.zero_if(equal, _REFUSAL).to(query.dtype)
    if has_values(query) and not equal:
        raise UnsupportedModelError(_REFUSAL)
    return query


def is_plain_causal(mask: Tensor) -> Tensor:
    """Whether a mask ``[..., S, S]`` shows every query all up to itself, and no more: bool ``[]``.

    Every entry is looked at. Where that is not fused into one pass, it goes by rows, so that what
    is stored on the way stays small.
    """
    S = mask.shape[-1]
    step = S
    if not torch.compiler.is_compiling():
        step = max(1, _ENTRIES_AT_ONCE * S // max(mask.numel(), 1))
    right = [
        _is_causal_prefix(_visible(mask[..., i : i + step, :]), min(i + step, S), min(step, S - i))
        for i in range(0, S, step)
    ]
    return torch.stack(right).all()


def _is_causal_bias(mask: Tensor) -> bool:
    # By name: its module imports the compiler, which `import infllm_flex` must not wait for.
    return type(mask).__name__ == "CausalBias"


def is_biased(mask: Tensor) -> bool:
    """Whether a mask does more than show and hide; reads its values. Of none, it says no."""
    numbers = mask.dtype != torch.bool and not _is_causal_bias(mask)
    return numbers and not mask.is_meta and bool(adds_to_logits(mask))


def adds_to_logits(mask: Tensor) -> Tensor:
    """Whether any number of a mask neither shows nor hides: bool ``[]``."""
    return ((mask != 0) & (mask > _HIDDEN)).any()


def _visible(mask: Tensor) -> Tensor:
    """True where a key is seen. A bias that neither shows nor hides breaks the causal pattern."""
    return mask if mask.dtype == torch.bool else (mask == 0) & ~adds_to_logits(mask)


def _is_causal_prefix(visible: Tensor, last: int, q_len: int) -> Tensor:
    """Whether query s sees the first ``last - q_len + s + 1`` keys and no other, in every row."""
    ends = torch.arange(last - q_len + 1, last + 1, device=visible.device)
    expected = torch.arange(visible.shape[-1], device=visible.device) < ends[:, None]
    return (visible == expected).all()
