"""Tiny folders in MiniCPM 4's format, with its names and with code that must not run."""

import json

import torch
from safetensors.torch import save_file

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.02, 1.3, 1.7],
    "long_factor": [1.1, 2.0, 3.5, 6.0],
    "original_max_position_embeddings": 32,
}
SPARSE = {
    "kernel_size": 4,
    "kernel_stride": 2,
    "init_blocks": 1,
    "block_size": 8,
    "window_size": 8,
    "topk": 2,
    "use_nope": False,
    "dense_len": 48,
}
CONFIG = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModel": "modeling_minicpm.MiniCPMModel",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": [2, 40],
    "pad_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "minicpm",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": LONGROPE,
    "torch_dtype": "float32",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "vocab_size": 64,
    "scale_emb": 12,
    "dim_model_base": 8,
    "scale_depth": 1.4,
    "mup_denominator": 3,  # not used here, must be kept
    "tie_word_embeddings": False,
    "sparse_config": SPARSE,
}


def config(**changes):
    """A ``config.json``; a setting changed to ``...`` is left out."""
    return {n: value for n, value in {**CONFIG, **changes}.items() if value is not ...}


def tensors(settings):
    """Random weights, in float32."""
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    head_dim = hidden // heads
    shapes = {"model.embed_tokens": (settings["vocab_size"], hidden), "model.norm": (hidden,)}
    if not settings.get("tie_word_embeddings", True):
        shapes["lm_head"] = (settings["vocab_size"], hidden)
    for index in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj": (heads * head_dim, hidden),
            f"{layer}.self_attn.k_proj": (kv_heads * head_dim, hidden),
            f"{layer}.self_attn.v_proj": (kv_heads * head_dim, hidden),
            f"{layer}.self_attn.o_proj": (hidden, heads * head_dim),
            f"{layer}.mlp.gate_proj": (inner, hidden),
            f"{layer}.mlp.up_proj": (inner, hidden),
            f"{layer}.mlp.down_proj": (hidden, inner),
            f"{layer}.input_layernorm": (hidden,),
            f"{layer}.post_attention_layernorm": (hidden,),
        }
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def write(folder, settings, dtype=torch.float32, files=1):
    """Write a folder whose code must not run.

    Args:
        folder: Is made.
        settings: Content of ``config.json``.
        dtype: Dtype of the weights.
        files: How many they are in.

    Returns:
        The weights.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("configuration_minicpm", "modeling_minicpm", "unrelated"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} must not run')\n")
    weights = {name: value.to(dtype) for name, value in tensors(settings).items()}
    if files == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return weights
    places = {name: f"model-{i % files + 1}.safetensors" for i, name in enumerate(weights)}
    for place in set(places.values()):
        part = {name: value for name, value in weights.items() if places[name] == place}
        save_file(part, folder / place, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights
