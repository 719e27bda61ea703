"""Checks of a MiniCPM ``config.json``: what is supported, and errors for everything else."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from infllm_flex.config import InfLLMConfig

ARCHITECTURE = "MiniCPMForCausalLM"
_SCALES = ("scale_emb", "scale_depth", "dim_model_base")
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse a model that would not compute what its own code computes.

    Args:
        settings: The content of ``config.json``.

    Raises:
        ValueError: Another architecture, experts, a setting without which the model is not defined,
            or a ``sparse_config`` that is no valid `InfLLMConfig`.
    """
    architectures = settings.get("architectures")
    if architectures and ARCHITECTURE not in architectures:
        raise ValueError(
            f"architectures is {architectures}, but only {ARCHITECTURE} is supported for "
            "model_type minicpm: load this folder in a process that has not imported infllm_flex"
        )
    if settings.get("num_experts"):
        raise ValueError(
            f"num_experts is {settings['num_experts']}: MiniCPM with experts is not supported; "
            "use a dense MiniCPM"
        )
    for name in (*_SCALES, *_SIZES):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(
                f"{name} must be a number above 0, got {value!r}: programs use different defaults "
                "for it; add the value that the model was trained with to config.json"
            )
    _check_heads(settings)
    _check_choice("hidden_act", settings.get("hidden_act", "silu"), _activations())
    _check_quantisation(settings.get("quantization_config"))
    if settings.get("sparse_config") is not None:
        InfLLMConfig.from_dict(settings["sparse_config"])


def _activations() -> Collection[str]:
    from transformers.activations import ACT2FN

    return ACT2FN


def _check_quantisation(config: object) -> None:
    """Accept the methods that transformers knows: it reads them, or raises for what it lacks."""
    if not isinstance(config, Mapping):
        return
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    kinds = [name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING]
    _check_choice("quantization_config.quant_method", config.get("quant_method"), set(kinds))


def _check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(sorted(choices))}, got {value!r}")


def _check_heads(settings: Mapping[str, Any]) -> None:
    head_dim, rest = divmod(settings["hidden_size"], settings["num_attention_heads"])
    if rest:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads = "
            f"{settings['num_attention_heads']}, got {settings['hidden_size']}"
        )
    for name in ("head_dim", "kv_channels"):
        if settings.get(name) not in (None, head_dim):
            raise ValueError(
                f"{name} must be hidden_size / num_attention_heads = {head_dim}, "
                f"got {settings[name]!r}"
            )


def read_rope(
    scaling: Mapping[str, Any] | None, theta: float, types: Collection[str]
) -> dict[str, Any]:
    """Read the rotary embedding into the form that transformers uses.

    Args:
        scaling: ``rope_scaling``, with its type under ``rope_type`` or the older ``type``.
        theta: ``rope_theta``.
        types: The types that transformers computes.

    Returns:
        ``scaling`` and ``rope_theta`` in one mapping, with ``rope_type``.

    Raises:
        ValueError: An unknown type, or two types that differ.
    """
    rope = dict(scaling or {})
    kind = rope.setdefault("rope_type", rope.get("type", "default" if not scaling else None))
    if rope.get("type", kind) != kind:
        raise ValueError(
            f"rope_scaling has type {rope['type']!r} and rope_type {kind!r}: leave one of them"
        )
    _check_choice("rope_scaling.rope_type", kind, types)
    rope.setdefault("rope_theta", theta)
    return rope


def check_longrope(rope: Mapping[str, Any], head_dim: int, max_positions: int) -> None:
    """Refuse longrope that is incomplete, or that programs interpret differently.

    MiniCPM's code, and most programs that serve it, compute the factor on attention from the ratio
    of the two lengths and read no other key for it.

    Args:
        rope: As `read_rope` gives it.
        head_dim: Head dim of the model; each frequency has a factor.
        max_positions: ``max_position_embeddings``.

    Raises:
        ValueError: There are too few or too many factors, or two numbers contradict each other.
    """
    original = rope.get("original_max_position_embeddings")
    if isinstance(original, bool) or not isinstance(original, int) or original < 2:
        raise ValueError(
            f"rope_scaling.original_max_position_embeddings must be an integer, got {original!r}"
        )
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if not isinstance(factors, list) or len(factors) != head_dim // 2:
            found = len(factors) if isinstance(factors, list) else repr(factors)
            raise ValueError(
                f"rope_scaling.{name} must be a list of head_dim / 2 = {head_dim // 2} numbers, "
                f"got {found}"
            )
    ratio = max_positions / original
    if ratio < 1:
        raise ValueError(
            f"max_position_embeddings must be at least rope_scaling."
            f"original_max_position_embeddings = {original}, got {max_positions}"
        )
    on_attention = math.sqrt(1 + math.log(ratio) / math.log(original))
    for name, expected in (("factor", ratio), ("attention_factor", on_attention)):
        value = rope.get(name)
        if value is not None and not math.isclose(value, expected, rel_tol=1e-6):
            raise ValueError(
                f"rope_scaling.{name} is {value}, but max_position_embeddings / "
                f"original_max_position_embeddings = {max_positions} / {original} gives "
                f"{expected:g}, which is what MiniCPM's own code uses: remove {name}, or set "
                "max_position_embeddings"
            )
