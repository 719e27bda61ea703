"""Whether a mask beyond causal and padded isolates the documents of its batch, and no more."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.patch.huggingface.documents import Sequences, open_documents
from infllm_flex.patch.huggingface.masks import LazyMask, causal_mask
from infllm_flex.patch.running_forward import current_forward


def causal_mask_for_training(**arguments: Any) -> LazyMask | Tensor | None:
    """Make a mask by `causal_mask`, and in training begin at once to judge it.

    The layers need the verdict at sparse length. The kernels that the host launches before the
    first of them keep the device busy until it is there.
    """
    mask = causal_mask(**arguments)
    forward = current_forward()
    if isinstance(mask, LazyMask) and not mask.is_plain and forward is not None:
        positions, length = forward.positions, mask.shape[-1]
        is_counted = forward.num_documents is not None and mask.padding is None
        if is_counted and positions is not None and length >= forward.sparse_from:
            opens = open_documents(positions.expand(mask.shape[0], -1))
            is_real = torch.ones_like(opens)
            mask.begin_verdict(positions, _isolates(mask, opens, is_real, positions))
    return mask


def isolates_documents(
    mask: LazyMask, query: Tensor, sequences: Sequences | None, positions: Tensor | None
) -> Tensor:
    """Whether a mask is causal within the sequences, or within those transformers assumes.

    Args:
        mask: The mask.
        query: ``[B, Hq, S, D]``.
        sequences: Sequences of the batch; None for one per row.
        positions: ``[1 or B, S]``, where the call has any.

    Returns:
        bool ``[]``.
    """
    if sequences is not None:
        opens, is_real = sequences.opens, sequences.is_real
    else:
        is_real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        opens = is_real.long().cumsum(-1) == 1
    return _isolates(mask, opens, is_real, positions)


def _isolates(mask: LazyMask, opens: Tensor, is_real: Tensor, positions: Tensor | None) -> Tensor:
    """The same by where sequences start and which tokens are real: bool ``[B, S]`` each.

    transformers begins a document wherever positions do anything else than go on by one. A mask
    made that way comes from positions alone, whose meaning we decide.
    """
    served = mask.isolates_documents(opens, is_real)
    if positions is None or mask.padding is not None:
        return served
    jumps = F.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)
    return served | mask.isolates_documents(jumps.expand_as(opens), is_real)
