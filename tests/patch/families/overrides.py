"""Fields that the generic tiny configuration lacks, by model type."""

from __future__ import annotations

from typing import Any

# Fields of the configuration, of its parts under their names.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}  # 2 x hidden size
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 8,
}
_GEMMA4 = {"global_head_dim": 32}
_SHARED_KEYS = {  # the last two layers attend to keys of the first two
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": 64,
    "activation_sparsity_pattern": None,
}
_SHARED_LAYER = {
    "num_hidden_layers": 3,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
}
_DRAFTER = {
    "backbone_hidden_size": 64,
    "text_config": {**_GEMMA4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
}
_DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "head_dim": 24,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "patching_threshold": 4.3},  # most bytes a patch
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
            }
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3,
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": _SHARED_KEYS,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_assistant": _DRAFTER,
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_assistant": _DRAFTER,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"initializer_range": 0.1},  # sixteen layers, which amplify rounding
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": None},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_SHARED_LAYER, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": _SHARED_LAYER,
}

# Where the defaults are not what is released; the table names it.
AS_RELEASED: dict[str, dict[str, Any]] = {
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": None},
}

# The part of a configuration that the class of a type takes.
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}

# Types that cannot be built, and why.
NOT_BUILT = {"gemma3n": "its vision tower needs timm; gemma3n_text is its language model"}
