"""The parts of vLLM's own configuration that the plugin reads."""

from __future__ import annotations

import functools
from typing import Any

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.settings import Resolved
from infllm_flex.vllm.page_layout import fitting_page
from infllm_flex.vllm.refusals import ServerFacts
from infllm_flex.vllm.rotation import is_known_to_suit
from infllm_flex.vllm.settings import read_settings
from infllm_flex_ops.device import FLOAT8_CAPABILITY

FULL = "full_attention"  # vLLM's name for layers that attend to all earlier tokens

# vLLM asks for page sizes where no configuration is current. A process loads one model at a time.
_last_read: InfLLMConfig | None = None


def read_served(vllm_config: Any) -> Resolved | None:
    """Read what a model is to be served with; None for a model that asks for nothing."""
    model_config = vllm_config.model_config
    if model_config is None:
        return None
    text_config = model_config.hf_text_config
    return read_settings(
        vllm_config.additional_config,
        text_config,
        _has_float8,
        functools.partial(is_known_to_suit, text_config),
    )


def move_sparse_config(vllm_config: Any) -> None:
    """Put a multimodal model's ``sparse_config`` where its text model finds it.

    vLLM loads the text model with the text config alone. An outer ``sparse_config`` counts first,
    as it does in `patch_model`.
    """
    model_config = vllm_config.model_config
    outer = getattr(model_config and model_config.hf_config, "sparse_config", None)
    if outer is not None:
        model_config.hf_text_config.sparse_config = outer


def choose_page_size(vllm_config: Any, config: InfLLMConfig) -> None:
    """Replace the page size that vLLM takes on a CPU, where it asks no backend for one.

    Args:
        vllm_config: Changed in place, unless the user named a page size.
        config: Settings of the model.
    """
    cache = vllm_config.cache_config
    if _on_cpu(vllm_config) and not cache.user_specified_block_size:
        cache.block_size = fitting_page(config, cache.block_size)


def settings_of(vllm_config: Any) -> InfLLMConfig:
    """Return the settings of the model that is being loaded.

    Raises:
        ValueError: The model has none.
    """
    global _last_read
    served = read_served(vllm_config)
    if served is None:
        raise ValueError(
            "the attention backend CUSTOM is InfLLM-V2, which needs settings: pass "
            "--additional-config '{\"infllm\": {...}}', or a model with a sparse_config"
        )
    _last_read = served.config
    return served.config


def current_settings(vllm_config: Any) -> InfLLMConfig | None:
    """Return the settings of the current configuration, else those read last in this process."""
    served = None if vllm_config is None else read_served(vllm_config)
    return _last_read if served is None else served.config


def server_facts(vllm_config: Any) -> ServerFacts:
    """Collect what decides if a model can be served."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, drafts = vllm_config.parallel_config, vllm_config.speculative_config
    backends = vllm_config.attention_config
    backend = backends.backend_per_kind.get(FULL, backends.backend)
    named = cache.user_specified_block_size
    runs_ahead = drafts is not None and vllm_config.scheduler_config.async_scheduling
    return ServerFacts(
        uses_mla=model.use_mla,
        has_encoder=_has_encoder(model),
        has_other_layers=model.is_hybrid,
        full_layers=not model.is_attention_free and _has_full_layers(model.hf_text_config),
        cache_dtype=str(cache.cache_dtype),
        model_dtype=str(model.dtype).removeprefix("torch."),
        page_size=cache.block_size if named or _on_cpu(vllm_config) else None,
        attention_backend=None if backend is None or backend.name == "CUSTOM" else backend.name,
        tensor_parallel=parallel.tensor_parallel_size,
        kv_heads=_fewest_kv_heads(model),
        context_parallel=parallel.decode_context_parallel_size
        * parallel.prefill_context_parallel_size,
        moves_pages=vllm_config.kv_transfer_config is not None,
        drafts=None if drafts is None else drafts.method,
        ahead=drafts.num_speculative_tokens if runs_ahead else 0,
    )


def _has_encoder(model: Any) -> bool:
    # vLLM heeds is_causal in any model, but names the attention by it in pooling models alone.
    causal = getattr(model.hf_text_config, "is_causal", True)
    return not causal or model.attn_type.startswith("encoder")


def _on_cpu(vllm_config: Any) -> bool:
    return vllm_config.device_config.device_type == "cpu"


def _fewest_kv_heads(model: Any) -> int:
    """Key/value heads of the layer that has fewest; layers without attention have none."""
    layers = model.model_arch_config
    counts = (layers[i].total_num_kv_heads for i in range(layers.total_num_hidden_layers))
    return min((count for count in counts if count), default=1)


def _has_float8() -> bool:
    """Whether the device multiplies float8. vLLM answers without starting CUDA in this process."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and current_platform.has_device_capability(FLOAT8_CAPABILITY)


def _has_full_layers(text_config: Any) -> bool:
    """Whether the configuration names a layer that sees all earlier tokens."""
    kinds = getattr(text_config, "layer_types", None)
    if kinds:
        return FULL in kinds
    return getattr(text_config, "sliding_window", None) is None
