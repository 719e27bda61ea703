"""Attention of the structure that four libraries use, and nothing else of theirs."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.patch.plain_models import WIDTH


def split_heads(x, *sizes):
    """Cut ``[B, S, H * D]`` to heads ``[B, H, S, D]``."""
    return x.unflatten(-1, (-1, 16)).transpose(1, 2).split(sizes, dim=1)


class TuneStyle(nn.Module):
    """A function stored on the instance attends; keys are expanded before."""

    def __init__(self, is_causal=True):
        super().__init__()
        self.num_heads, self.num_kv_heads = 4, 2
        self.is_causal = is_causal
        self.qkv, self.output_proj = nn.Linear(WIDTH, WIDTH + 64), nn.Linear(WIDTH, WIDTH)
        self._attention_call = choose_kernel()

    def forward(self, x, mask=None):
        q, k, v = split_heads(self.qkv(x), 4, 2, 2)
        B, _, S, D = k.shape
        k, v = (t[:, :, None].expand(B, 2, 2, S, D).reshape(B, 4, S, D) for t in (k, v))
        causal = self.is_causal and mask is None
        out = self._attention_call(q, k, v, mask=mask, dropout_p=0.0, is_causal=causal)
        return self.output_proj(out.transpose(1, 2).flatten(2))


def choose_kernel():
    def attend(q, k, v, mask, dropout_p, is_causal):
        if mask is not None:
            mask = mask[:, None, :, :]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal
        )

    return attend


class GptStyle(nn.Module):
    """A method named like SDPA attends; with a soft cap, the softmax is written by hand."""

    def __init__(self, softcap=None, window=False):
        super().__init__()
        self.config = SimpleNamespace(
            n_head=4, n_query_groups=2, attention_logit_softcapping=softcap, sliding_window_size=32
        )
        self.apply_sliding_window_attention = window
        self.qkv, self.proj = nn.Linear(WIDTH, WIDTH + 64), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask=None):
        q, k, v = split_heads(self.qkv(x), 4, 2, 2)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return self.proj(self.scaled_dot_product_attention(q, k, v, mask).flatten(2))

    def scaled_dot_product_attention(self, q, k, v, mask=None):
        if (cap := self.config.attention_logit_softcapping) is not None:
            scores = (q @ k.mT / cap).tanh() * cap
            hidden = torch.ones(q.shape[2], k.shape[2]).triu(1).bool()
            y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=0.0, scale=0.3, is_causal=mask is None
            )
        return y.transpose(1, 2)


class TitanStyle(nn.Module):
    """A module without parameters attends; a setting selects it."""

    def __init__(self, inner):
        super().__init__()
        self.n_heads, self.n_kv_heads = 4, 2
        self.wqkv, self.wo = nn.Linear(WIDTH, WIDTH + 64), nn.Linear(WIDTH, WIDTH)
        self.inner_attention = inner()

    def forward(self, x):
        q, k, v = split_heads(self.wqkv(x), 4, 2, 2)
        return self.wo(self.inner_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class HeadsFirst(nn.Module):
    def forward(self, q, k, v, *, scale=None, enable_gqa=False, is_causal=True):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            return F.scaled_dot_product_attention(
                q, k, v, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
            )


class TokensFirst(HeadsFirst):
    def forward(self, q, k, v, *, scale=None, enable_gqa=False, is_causal=True):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)


class TitanTokensFirst(TitanStyle):
    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in split_heads(self.wqkv(x), 4, 2, 2))
        return self.wo(self.inner_attention(q, k, v, enable_gqa=True).flatten(2))


class MaskedKernel(nn.Module):
    def forward(self, q, k, v, *, block_mask=None, enable_gqa=False):
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=enable_gqa)


class XStyle(nn.Module):
    """A module with a ``causal`` flag attends, and expands the keys itself."""

    def __init__(self, causal=True, flash=True):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(WIDTH, WIDTH + 64), nn.Linear(WIDTH, WIDTH)
        self.attend = Attend(causal, flash)

    def forward(self, x):
        out, _ = self.attend(*split_heads(self.to_qkv(x), 4, 2, 2), mask=None)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Attend(nn.Module):
    def __init__(self, causal, flash):
        super().__init__()
        self.causal, self.flash, self.scale = causal, flash, 0.2

    def forward(self, q, k, v, mask=None):
        k, v = (t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v))
        if self.flash:
            return self.flash_attn(q, k, v, mask=mask), None
        scores = q @ k.mT * self.scale
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e30)
        return scores.softmax(-1) @ v, scores

    def flash_attn(self, q, k, v, mask=None):
        q = q * (self.scale * 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)


LIBRARY_MODELS = {
    "torchtune's _attention_call": TuneStyle,
    "litgpt's method": GptStyle,
    "torchtitan's inner_attention": lambda: TitanStyle(HeadsFirst),
    "x-transformers' Attend": XStyle,
}
