"""Is a mask causal? Every question of that kind, asked of tensors and of mask functions.

Masks are as SDPA takes them: bool (True: seen), or numbers that are added to the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HIDDEN = -1e4  # additive masks hide by -inf, by the least number, or by some large one
_ENTRIES_AT_ONCE = 2**24  # entries of a mask that are compared together


def visible_keys(mask: Tensor) -> Tensor:
    """True where a mask shows a key."""
    return mask if mask.dtype is torch.bool else mask == 0


def adds_to_logits(mask: Tensor) -> Tensor:
    """Whether any number of a mask neither shows nor hides: bool ``[]``."""
    return ((mask != 0) & (mask > _HIDDEN)).any()


def unbiased_visible_keys(mask: Tensor) -> Tensor:
    """`visible_keys`, but nothing where the mask adds to logits: it then matches no pattern."""
    visible = visible_keys(mask)
    return visible if mask.dtype is torch.bool else visible & ~adds_to_logits(mask)


def is_causal_bias(mask: Tensor) -> bool:
    """Whether a mask is PyTorch's ``CausalBias``, which is causal by its kind and holds no data."""
    # By name: its module imports the compiler, which `import infllm_flex` must not load.
    return type(mask).__name__ == "CausalBias"


def is_biased(mask: Tensor) -> bool:
    """Whether a mask does more than show and hide. Reads its values; False where it has none."""
    numbers = mask.dtype is not torch.bool and not is_causal_bias(mask)
    return numbers and not mask.is_meta and bool(adds_to_logits(mask))


def is_causal_prefix(visible: Tensor, last: int, q_len: int) -> Tensor:
    """Whether query s sees the first ``last - q_len + s + 1`` keys and no other, in every row.

    Args:
        visible: bool ``[..., q_len, S]``.
        last: Number of keys that the last query should see.
        q_len: Number of queries.

    Returns:
        bool ``[]``.
    """
    ends = torch.arange(last - q_len + 1, last + 1, device=visible.device)
    expected = torch.arange(visible.shape[-1], device=visible.device) < ends[:, None]
    return (visible == expected).all()


def is_plain_causal(mask: Tensor) -> Tensor:
    """Whether a mask ``[..., S, S]`` shows every query all keys up to itself, and no more.

    Every entry is compared. Eager code does so by rows, which keeps the intermediates small; a
    compiler fuses it into one pass.

    Returns:
        bool ``[]``.
    """
    S = mask.shape[-1]
    step = S
    if not torch.compiler.is_compiling():
        step = max(1, _ENTRIES_AT_ONCE * S // max(mask.numel(), 1))
    parts = []
    for i in range(0, S, step):
        visible = unbiased_visible_keys(mask[..., i : i + step, :])
        parts.append(is_causal_prefix(visible, min(i + step, S), min(step, S - i)))
    return torch.stack(parts).all()


def first_visible_slots(mask: Tensor) -> Tensor:
    """Find where each row's tokens begin, by what its last query sees.

    Args:
        mask: ``[B, H, n, S]``, or ``[1, H, n, S]`` for all rows.

    Returns:
        int64 ``[B]``, or ``[1]``; ``S`` for a row that sees nothing.
    """
    visible = visible_keys(mask)[:, 0, -1]
    return torch.where(visible.any(-1), visible.int().argmax(-1), mask.shape[-1])


def is_causal_after_padding(mask: Tensor, start: Tensor, end: Tensor | int) -> Tensor:
    """Whether every query sees its row from slot ``start`` up to itself, and no more.

    A mask that adds to logits, or that differs by head, does more than that.

    Args:
        mask: ``[B, H, n, S]``.
        start: Slot of each row's first token, int64 ``[B]`` or ``[1]``.
        end: Slot after the last query.

    Returns:
        bool ``[]``.
    """
    n, S = mask.shape[2:]
    slot = torch.arange(S, device=mask.device)
    own = torch.arange(-n, 0, device=mask.device) + end
    expected = (slot >= start[:, None, None]) & (slot <= own[:, None])
    plain = (visible_keys(mask)[:, 0] == expected).all()
    if mask.dtype is not torch.bool:
        plain &= ~adds_to_logits(mask)
    return plain if mask.shape[1] == 1 else plain & (mask == mask[:, :1]).all()


def isolates_documents(
    sees: Callable[[Tensor, Tensor, Tensor], Tensor], opens: Tensor, is_real: Tensor
) -> Tensor:
    """Whether a mask function is causal within documents, judged without a table of all pairs.

    Only lines through the table are evaluated: what each query sees just before and just after
    itself, of its document's first token and of the token before that; and what each document's
    last query sees of its tokens. This tells packing from prefixes, windows and blocks.

    Args:
        sees: Maps rows ``[B, 1]`` and queries and keys ``[n, B, S]`` to bool ``[n, B, S]``.
        opens: bool ``[B, S]``, whether a document starts at this token.
        is_real: bool ``[B, S]``, false at padding.

    Returns:
        bool ``[]``.
    """
    B, S = opens.shape
    token = torch.arange(S, device=opens.device).expand(B, -1)
    first = torch.where(opens, token, 0).cummax(-1).values
    # A document's last token stands before the next one's first. Found from the end backwards.
    closes = opens.roll(-1, -1)
    closes = torch.where(token == S - 1, True, closes)
    last = torch.where(closes, token, S - 1).flip(-1).cummin(-1).values.flip(-1)
    row = torch.arange(B, device=opens.device)[:, None]

    # Stacked, so that no index is a bare arange: Inductor may write C++ that checks the bounds of
    # such an index before it computes it.
    query = torch.stack((token, token, token, token, last))
    key = torch.stack((token - 1, token + 1, first, first - 1, token))
    inside = (key >= 0) & (key < S)
    key = key.clamp(0, S - 1)
    # A mask function knows nothing of padding.
    visible = sees(row, query, key) & inside & is_real[row, key]
    before, after, to_first, before_first, from_last = visible.unbind()
    right = (before == ~opens) & ~after & to_first & ~before_first & from_last
    return (right | ~is_real).all()
