"""Dense attention by SDPA, of one sequence per row or within the sequences of a layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.layout import Layout
from infllm_flex_ops.sizes import group_size


def attend_dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend causally, aligned at the last position."""
    Sq, Skv = query.shape[2], key.shape[2]
    enable_gqa = query.shape[1] != key.shape[1]
    if Sq == Skv:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
    # Imported here: it imports the compiler, for which `import infllm_flex` must not wait.
    from torch.nn.attention.bias import causal_lower_right

    mask = None if Sq == 1 else causal_lower_right(Sq, Skv)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    )


def attend_dense_in_layout(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> Tensor:
    """Attend under the mask of the sequences; padding is zero before and after it.

    SDPA multiplies hidden values by zero. A nan in a document therefore reaches those packed with
    it here, but not where a sequence is sparse.
    """
    Sq, G = query.shape[2], group_size(query.shape[1], key.shape[1])
    is_real = layout.is_real()[:, None, :, None]
    key, value = (torch.where(is_real, x, 0) for x in (key, value))
    query = torch.where(is_real[:, :, -Sq:], query, 0)
    # SDPA's fast kernels take no mask together with enable_gqa.
    key, value = (x.repeat_interleave(G, 1) if G > 1 else x for x in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=layout.dense_mask(Sq), scale=scale
    )
    return torch.where(is_real[:, :, -Sq:], out, 0)
