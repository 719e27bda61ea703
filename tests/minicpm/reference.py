"""MiniCPM 4's forward in plain operations: what its architecture says, sharing no code.

Embeddings times ``scale_emb``; layers of causal attention with grouped heads and a gated MLP, each
half added times ``scale_depth / sqrt(layers)``; logits divided by ``hidden_size / dim_model_base``.
Longrope divides every frequency by a factor of its own, short or long by the number of tokens, and
multiplies cosines and sines by one that grows with the ratio of both lengths.

Source: arXiv 2506.07900, section 2; arXiv 2404.06395, section 3; arXiv 2402.13753, section 3.
"""

import math

import torch


def logits(settings, weights, tokens, dtype=torch.float64):
    """Compute the logits of the model.

    Args:
        settings: Content of ``config.json``.
        weights: By name.
        tokens: int64 ``[B, S]``.
        dtype: Dtype of the whole computation.

    Returns:
        ``[B, S, vocab_size]``.
    """
    w = {name: value.to(dtype) for name, value in weights.items()}
    hidden, eps = settings["hidden_size"], settings["rms_norm_eps"]
    residual = settings["scale_depth"] / math.sqrt(settings["num_hidden_layers"])
    cos, sin = rotary(settings, tokens.shape[1], dtype)
    x = w["model.embed_tokens.weight"][tokens] * settings["scale_emb"]
    for index in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        normed = norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        x = x + residual * attention(settings, w, f"{layer}.self_attn", normed, cos, sin)
        normed = norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        gate = normed @ w[f"{layer}.mlp.gate_proj.weight"].T
        up = normed @ w[f"{layer}.mlp.up_proj.weight"].T
        x = x + residual * ((gate * gate.sigmoid() * up) @ w[f"{layer}.mlp.down_proj.weight"].T)
    x = norm(x, w["model.norm.weight"], eps) / (hidden / settings["dim_model_base"])
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return x @ head.T


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def attention(settings, w, name, x, cos, sin):
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]

    def split(part, count):  # [B, count, S, D]
        out = x @ w[f"{name}.{part}_proj.weight"].T
        return out.unflatten(-1, (count, -1)).transpose(1, 2)

    query, key, value = split("q", heads), split("k", kv_heads), split("v", kv_heads)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    out = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
    return out.transpose(1, 2).flatten(2) @ w[f"{name}.o_proj.weight"].T


def rotary(settings, length, dtype):
    """Cosines and sines, ``[S, D / 2]``, of angles in float32 at least."""
    exact = torch.promote_types(dtype, torch.float32)
    head_dim = settings["hidden_size"] // settings["num_attention_heads"]
    frequencies = settings["rope_theta"] ** (-torch.arange(0, head_dim, 2).to(exact) / head_dim)
    on_attention = 1.0
    if scaling := settings["rope_scaling"]:
        original = scaling["original_max_position_embeddings"]
        factors = scaling["long_factor" if length > original else "short_factor"]
        frequencies = frequencies / torch.tensor(factors, dtype=exact)
        ratio = settings["max_position_embeddings"] / original
        on_attention = math.sqrt(1 + math.log(ratio) / math.log(original))
    angles = torch.arange(length)[:, None] * frequencies
    return (angles.cos() * on_attention).to(dtype), (angles.sin() * on_attention).to(dtype)


def rotate(x, cos, sin):
    """Turn the pairs of the first and the second half of a head."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
