"""Head sizes, read from a layer before it runs, and those that sparse attention cannot serve."""

from __future__ import annotations

from typing import Any

from torch import nn

from infllm_flex.validation import MAX_HEAD_DIM

_KEY_NAMES = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_VALUE_NAMES = ("v_head_dim", "value_head_dim", "head_v_dim")


def unsupported_head_dims(key_dim: int, value_dim: int) -> str | None:
    """Why a head size is not served, in a few words; None if it is.

    Args:
        key_dim: Head size of queries and keys.
        value_dim: Head size of values.
    """
    if key_dim > MAX_HEAD_DIM:
        return f"heads of {key_dim}, more than {MAX_HEAD_DIM}"
    if key_dim != value_dim:
        return f"values of {value_dim} per head, keys of {key_dim}"
    return None


def read_head_dim(module: object) -> int | None:
    """Head size of queries and keys by the attributes of a layer or config; None if none tells."""
    return _first(module, _KEY_NAMES)


def head_dim_skip_reason(module: nn.Module) -> str | None:
    """The same for a layer, by its attributes and projections; None where these do not tell."""
    key_dim = read_head_dim(module)
    if key_dim is None:
        return None
    value_dim = _first(module, _VALUE_NAMES)
    if value_dim is None:
        value_dim = _value_dim(module, key_dim)
    return unsupported_head_dims(key_dim, value_dim)


def _first(module: object, names: tuple[str, ...]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((size for size in found if isinstance(size, int) and size > 0), None)


def _value_dim(module: nn.Module, key_dim: int) -> int:
    """Head size of values, from the widths of the projections; keys have as many heads."""
    keys, values = (_width(getattr(module, name, None)) for name in ("k_proj", "v_proj"))
    return key_dim if keys is None or values is None else key_dim * values // keys


def _width(projection: Any) -> int | None:
    width = getattr(projection, "out_features", None)
    return width if isinstance(width, int) and width > 0 else None
