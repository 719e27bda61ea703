"""Tiny random models of any type in transformers' auto mapping of causal language models."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.patch.families.overrides import AS_RELEASED, NOT_BUILT, OVERRIDES, PARTS

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MAX_PARAMETERS = 4_000_000
VOCABULARY = 128
FIRST_SPECIAL = 104  # special tokens of large ids come here; below 4 are those of small ids

# The value of a size, by the end of its field's name; the first match counts. Heads are in groups
# of two, the head dim is 16.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input|_base)?", VOCABULARY),
    (r"(max_source_positions|rel_extent|position_embedding_size)", 512),
    (r"(sliding_window(_size)?|local_attention(_window_len)?|attention_window_size)", 32),
    (r"(attention_chunk_size|window_size)", 32),
    (r"(chunk_size|attn_chunk_length)", 16),
    (r"(qk_nope_head_dim|v_head_dim)", 16),
    (r"qk_rope_head_dim", 8),
    (r"(mamba_n_heads|mamba_num_heads)", 8),
    (
        r"(head_dim|headdim|dim_head|d_head|kv_channels|attention_head_size|query_pre_attn_scalar)",
        16,
    ),
    (r"(key_value_heads|kv_heads|kv_n_heads)", 2),
    (r"(num_)?(n_)?(attention_|v_|k_|linear_|index_|mamba_|key_|value_)?(heads?|key_heads)", 4),
    (r"(num_shared_experts|n_shared_experts)", 1),
    (r"(experts_per_tok|top_?k|moe_k|index_topk_blocks)", 2),
    (r"(n_group|n_groups|topk_group|num_blocks|num_nextn_predict_layers)", 1),
    (r"(num_experts|local_experts|routed_experts|zero_expert_num)", 4),
    (r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth)", 2),
    (r"(lora_rank|hidden_size_per_layer_input|adapter_rank|laurel_rank|gate_rank|lowrank)", 16),
    (r"(state_size|d_state|patch_size|rotary_dim|embedding_size|d_rel)", 16),
    (r"(hidden_size(_global)?|d_model|n_embd|n_embed|emb_dim|dim_model_base|embed_dim)", 64),
    (r"(intermediate_size(_mlp)?|ffn_dim|dim_ff|dff|d_inner|feed_forward_size)", 64),
    (r"(ffn_hidden_size|router_hidden_size|word_embed_proj_dim|out_hidden_size)", 64),
)
_LENGTHS = "max_position_embeddings|max_target_positions|n_positions|n_ctx|max_seq_len"
_EXACT: dict[str, Any] = {
    **dict.fromkeys(_LENGTHS.split("|"), 512),
    "initializer_range": 0.3,
    "init_std": 0.3,
    "is_decoder": True,
}
# Sizes that are set even if a default configuration has None.
_NEEDED = {
    "head_dim": 16,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
}


class NotBuiltError(Exception):
    """No tiny model of a type can be made, and why."""


def make_config(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a type."""
    changes = {**OVERRIDES.get(model_type, {}), **AS_RELEASED.get(model_type, {})}
    return _shrink(CONFIG_MAPPING[model_type], changes)


def build(model_type: str, **kwargs: Any) -> PreTrainedModel:
    """A model with the same weights on every call.

    Raises:
        NotBuiltError: With the reason.
    """
    if model_type in NOT_BUILT:
        raise NotBuiltError(NOT_BUILT[model_type])
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in _make_model(model_type).parameters())
        if size > MAX_PARAMETERS:
            raise NotBuiltError(f"{size / 1e6:.0f}M parameters where all sizes known are small")
        torch.manual_seed(0)
        model = _make_model(model_type, **kwargs)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def _make_model(model_type: str, **kwargs: Any) -> PreTrainedModel:
    config = make_config(model_type)
    if model_type in PARTS:  # transformers maps the whole's name to a class that takes a part
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        return getattr(transformers, name)._from_config(
            getattr(config, PARTS[model_type]), **kwargs
        )
    return AutoModelForCausalLM.from_config(config, **kwargs)


def _shrink(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of a class with every known size small, and ``changes`` on top."""
    try:
        default = kind()
    except Exception:  # a class that its own defaults do not satisfy
        default = kind(**changes)
    fields = [field.name for field in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for name in fields:
        value = _read(default, name)
        small = _NEEDED.get(name) if value is None else _small(name, value)
        if small is not None:
            values[name] = small
    values |= _few_layers(default, fields)
    heads, groups = "num_attention_heads", "num_key_value_heads"
    if groups in values and _read(default, groups) == _read(default, heads):
        values[groups] = values.get(heads, 4)
    for name in kind.sub_configs:
        if isinstance(part := _read(default, name), PreTrainedConfig):
            values[name] = _shrink(type(part), changes.get(name, {}))
    values |= {name: v for name, v in changes.items() if name not in kind.sub_configs}
    return kind(**values)


def _read(config: PreTrainedConfig, name: str) -> Any:
    """A field, also one of which transformers warns that single layers have their own."""
    return vars(config).get(name, config.__class__.__dict__.get(name))


def _small(name: str, value: object) -> Any:
    """The tiny value of a field of a configuration; None to leave it."""
    if name in _EXACT:
        return None if value is None else _EXACT[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if re.search(r"drop|jitter", name):
        return type(value)(0)
    if isinstance(value, float):
        return None
    if re.search(r"token_(id|index)$", name):
        return FIRST_SPECIAL + value % 20 if value >= FIRST_SPECIAL else None
    for pattern, small in _SIZES:
        if re.search(f"{pattern}$", name):
            return min(value, small) if value > 0 else None
    return None


def _few_layers(default: PreTrainedConfig, fields: list[str]) -> dict[str, Any]:
    """One layer of every kind in a default configuration, at least two; what lists a kind each."""
    count = getattr(default, "num_hidden_layers", None)
    lists = {
        name: list(value)
        for name in fields
        if isinstance(value := _read(default, name), list | tuple) and len(value) == count
    }
    if not any(name.endswith(("types", "type")) for name in lists):
        return {}
    kinds: dict[tuple[Any, ...], int] = {}
    for index in range(count):
        kind = tuple(str(v[index]) for name, v in lists.items() if isinstance(v[index], str))
        kinds.setdefault(kind, index)
    chosen = sorted(kinds.values())
    if len(chosen) == 1:
        chosen.append(1)
    picked: dict[str, Any] = {name: [v[i] for i in chosen] for name, v in lists.items()}
    if "num_hidden_layers" in fields:
        picked["num_hidden_layers"] = len(chosen)
    return picked
