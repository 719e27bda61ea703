"""Causal LMs written by hand in different styles, without any reference to this package."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH = 64, 64


class Decoder(nn.Module):
    """Embedding, blocks, head; the attention is a parameter."""

    def __init__(self, make_attention, layers=2):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(256, WIDTH)
        self.h = nn.ModuleList(Block(make_attention()) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.checkpointing = {}

    def forward(self, tokens, *context):
        positions = context[0] if context else torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.h:
            if self.checkpointing:
                x = checkpoint(block, x, *context, **self.checkpointing)
            else:
                x = block(x, *context)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = attn
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x, *context):
        x = x + self.attn(self.norm_1(x), *context)
        return x + self.mlp(self.norm_2(x))


class FusedHeads(nn.Module):
    """nanoGPT's style: one projection, no query groups, SDPA or a handwritten softmax."""

    def __init__(self, flash=True):
        super().__init__()
        self.n_head = 4
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = 0.0
        self.flash = flash

    def forward(self, x):
        B, T, C = x.shape
        heads = (t.view(B, T, self.n_head, -1) for t in self.c_attn(x).split(C, dim=2))
        q, k, v = (t.transpose(1, 2) for t in heads)
        if self.flash:
            y = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None,
                dropout_p=self.dropout if self.training else 0,
                is_causal=True,
            )
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
            mask = torch.ones(T, T, dtype=torch.bool).tril()
            y = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


@dataclass
class Args:
    n_heads: int = 4
    n_kv_heads: int = 2


class RepeatedHeads(nn.Module):
    """Llama's style: separate projections, a rotary embedding, keys repeated by a helper."""

    def __init__(self, args=None):
        super().__init__()
        self.args = args or Args()
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, self.args.n_kv_heads * 16, bias=False) for _ in "kv")
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, 16).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        k, v = (repeat_kv(t, self.args.n_heads // self.args.n_kv_heads) for t in (k, v))
        return self.wo(causal_attention(rotate(q), rotate(k), v).transpose(1, 2).flatten(2))


def repeat_kv(x, times):
    B, H, S, D = x.shape
    return x[:, :, None].expand(B, H, times, S, D).reshape(B, H * times, S, D)


def rotate(x):
    S, D = x.shape[-2:]
    angle = torch.arange(S)[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D)
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(pairs, dim=-1).flatten(-2)


def causal_attention(q, k, v):
    return attention(q, k, v, is_causal=True, scale=0.3)


class GroupedHeads(nn.Module):
    """One projection for queries and fewer keys, which SDPA broadcasts (``enable_gqa``)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, WIDTH + 2 * 32), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (-1, 16)).transpose(1, 2).split([4, 2, 2], dim=1)
        y = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class CycledHeads(nn.Module):
    """Keys repeated as a whole, so that query head h uses key head h modulo their number."""

    def __init__(self):
        super().__init__()
        self.heads, self.kv_heads = 4, 2
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, kv = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (self.to_q(x), self.to_kv(x)))
        k, v = (t.repeat(1, self.heads // self.kv_heads, 1, 1) for t in kv.chunk(2, dim=1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)
        return self.to_out(y.transpose(1, 2).flatten(2))


class OneHeadOfKeys(nn.Module):
    """Multi-query attention: one head of keys, broadcast. An additive mask."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.o = (nn.Linear(WIDTH, n) for n in (WIDTH, 32, WIDTH))

    def forward(self, x):
        T = x.shape[1]
        q = self.q(x).unflatten(-1, (-1, 16)).transpose(1, 2)
        k, v = self.kv(x)[:, None].chunk(2, dim=-1)
        mask = torch.full((T, T), float("-inf")).triu(1)
        return self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class CachedHeads(nn.Module):
    """gpt-fast's style: a cache of fixed size, and a boolean mask that makes it causal."""

    def __init__(self, size=256):
        super().__init__()
        self.n_head, self.n_local_heads = 4, 2
        self.wqkv, self.wo = nn.Linear(WIDTH, WIDTH + 64), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("causal", torch.ones(size, size, dtype=torch.bool).tril(), False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(2, 2, size, 16), persistent=False)

    def forward(self, x, positions):
        B, T, _ = x.shape
        q, k, v = self.wqkv(x).split([WIDTH, 32, 32], dim=-1)
        q, k, v = (t.view(B, T, -1, 16).transpose(1, 2) for t in (q, k, v))
        self.k_cache[:, :, positions], self.v_cache[:, :, positions] = k, v
        k, v = (c.repeat_interleave(2, dim=1) for c in (self.k_cache, self.v_cache))
        mask = self.causal[None, None, positions]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(B, T, -1))


STYLES = {
    "fused": FusedHeads,
    "repeated": RepeatedHeads,
    "grouped": GroupedHeads,
    "cycled": CycledHeads,
    "one head of keys": OneHeadOfKeys,
}


def plain_model(style="fused", layers=2, **options):
    """A model with the same weights on every call, whose keys differ enough for a selection."""
    make = STYLES[style] if isinstance(style, str) else style
    torch.manual_seed(0)
    model = Decoder(lambda: make(**options), layers).eval()
    with torch.no_grad():
        for parameter in model.h.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model
