"""InfLLM-V2 attention as plain SDPA under a mask, the reference for patched models."""

import torch
import torch.nn.functional as F

import infllm_flex as ifx


def masked_sdpa(query, key, value, config, *, scale=None):
    """As `infllm_attention` at or above ``dense_len``, with its selection but none of its lists."""
    selected = ifx.select_blocks(query, key, config, scale=scale)  # [B, Hkv, S, K]
    length = key.shape[2]
    block = torch.arange(length) // config.block_size
    chosen = (selected[..., None] == block).any(-2)  # [B, Hkv, S, S]
    groups = query.shape[1] // key.shape[1]
    mask = chosen.repeat_interleave(groups, dim=1) & torch.ones(length, length).tril().bool()
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
