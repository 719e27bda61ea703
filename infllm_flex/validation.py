"""Checks at the public border, and the assertions that replace them where no value can be read."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.autocast import as_autocast, attention_dtype, is_autocast_on
from infllm_flex_ops import torch_private

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ASCENDING = "selected must hold ascending blocks, each once, and -1 in unused slots after them"
_NUMBERS = (numbers.Real, torch.SymFloat, torch.SymInt)


def prepare_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Cast the inputs of attention as SDPA casts them, check them, and resolve the scale.

    Returns:
        Query, key, value, scale and selected blocks.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the scale is not positive.
            Blocks that do not ascend, where reading does not wait for a device.
    """
    query, key, scale = prepare_selection(query, key, scale)
    if is_autocast_on(value.device):
        value = as_autocast(value)
    if value.shape != key.shape:
        raise ValueError(
            f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    if value.dtype != key.dtype:
        raise ValueError(f"key and value must have one dtype, got {key.dtype} and {value.dtype}")
    if value.device != key.device:
        raise ValueError(
            f"key and value must be on one device, got {key.device} and {value.device}"
        )
    if selected is not None:
        selected = check_selected(selected, query, key)
    return query, key, value, scale, selected


def prepare_selection(
    query: Tensor, key: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, float]:
    """Do the same for the inputs of block selection."""
    if is_autocast_on(query.device):
        query, key = as_autocast(query), as_autocast(key)
    check_query_and_key(query, key)
    return query, key, resolve_scale(query, scale)


def resolve_scale(query: Tensor, scale: float | None) -> float:
    """Return ``scale``; ``1 / sqrt(D)`` if it is None.

    Kernels take the maximum of dot products before they multiply by it, and SDPA's masks are -inf:
    a factor that is not positive gives other numbers in each of them. The gradient of a tensor
    would be lost.

    Raises:
        ValueError: ``scale`` is not a positive, finite number.
    """
    if scale is None:
        return float(query.shape[-1]) ** -0.5
    if not isinstance(scale, _NUMBERS) or not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive, finite number, got {scale!r}")
    return scale


def check_query_and_key(query: Tensor, key: Tensor) -> None:
    """Raise a ValueError unless the shapes, dtypes and devices of the two fit together.

    Dtypes fit if autocast makes them equal.
    """
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, H, S, D], got shape {tuple(tensor.shape)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query and key must have one batch size, got {query.shape[0]} and {key.shape[0]}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]}"
        )
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query must not be longer than key, whose last positions it holds, "
            f"got {query.shape[2]} and {key.shape[2]}"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must have one head dim, got {query.shape[3]} and {key.shape[3]}"
        )
    check_head_dim_and_dtype("query", query)
    if query.dtype != key.dtype and attention_dtype(query) != attention_dtype(key):
        raise ValueError(f"query and key must have one dtype, got {query.dtype} and {key.dtype}")
    if query.device != key.device:
        raise ValueError(
            f"query and key must be on one device, got {query.device} and {key.device}"
        )


def check_head_dim_and_dtype(name: str, x: Tensor) -> None:
    """Raise a ValueError unless attention serves the last dimension and the dtype of ``x``."""
    if x.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head dim must be at most {MAX_HEAD_DIM}, got {x.shape[-1]}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_selected(selected: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Raise a ValueError unless blocks are int32 ``[B, Hkv, Sq, K]``, beside ``key``, and ascend.

    Returns:
        ``selected``, to be used from here on, as `require_rows` returns it.
    """
    _check_device("selected", selected, key)
    expected = (*key.shape[:2], query.shape[2])
    if selected.dim() != 4 or selected.shape[:3] != expected or selected.shape[3] == 0:
        raise ValueError(
            f"selected must be [B, Hkv, Sq, K] = [{', '.join(map(str, expected))}, K], "
            f"got {list(selected.shape)}"
        )
    if selected.dtype != torch.int32:
        raise ValueError(f"selected must be int32, got {selected.dtype}")
    return require_ascending(selected)


def require_ascending(selected: Tensor) -> Tensor:
    """Raise a ValueError unless lists hold each block once, ascending, and negative numbers last.

    Kernels merge lists, and read none beyond its first unused slot: lists in another order would
    lose blocks, and a repeated block would count twice.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``.

    Returns:
        ``selected``, as `require_rows` returns it.
    """
    before, after = selected[..., :-1], selected[..., 1:]
    ascends = (after < 0) | ((before >= 0) & (before < after))
    return require_rows(ascends.flatten(1).all(-1), _ASCENDING, selected)


def check_attention_mask(attention_mask: Tensor, key: Tensor) -> None:
    """Raise a ValueError unless the mask is ``[B, Skv]``, bool or integer, beside ``key``."""
    _check_device("attention_mask", attention_mask, key)
    expected = (key.shape[0], key.shape[2])
    if attention_mask.shape != expected:
        raise ValueError(
            f"attention_mask must be [B, Skv] = {list(expected)}, got {list(attention_mask.shape)}"
        )
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise ValueError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")


def check_cu_seqlens(cu_seqlens: Tensor, key: Tensor, q_len: int) -> None:
    """Raise a ValueError unless the bounds are ``[N + 1]`` of one row as long as its queries."""
    _check_device("cu_seqlens", cu_seqlens, key)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be [N + 1] for N documents, got shape {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if key.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs documents in one row, got a batch of {key.shape[0]}")
    if q_len != key.shape[2]:
        raise ValueError(
            f"with cu_seqlens query must be as long as key, got {q_len} and {key.shape[2]}"
        )


def _check_device(name: str, x: Tensor, key: Tensor) -> None:
    if x.device != key.device:
        raise ValueError(f"{name} must be on the device of key, {key.device}, got {x.device}")


def has_values(x: Tensor) -> bool:
    """Whether ``x`` holds values: it is neither on the meta device nor a fake tensor."""
    return not x.is_meta and not torch_private.is_fake(x)


def is_recorded(x: Tensor) -> bool:
    """Whether operations on ``x`` are recorded into a graph, where no value can be read."""
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def assert_in_graph(x: Tensor, condition: Tensor, message: str) -> Tensor:
    """Assert a condition on the device, without waiting for it.

    Args:
        x: Any tensor that the rest of the computation needs.
        condition: bool, one element.
        message: The expectation, and the remedy.

    Returns:
        ``x`` with its values and dtype. They depend on the check, so that no compiler pass removes
        it.
    """
    zero = infllm_flex_ops.assert_async(condition, message)
    return x | (zero != 0) if x.dtype == torch.bool else x + zero.to(x.dtype)


def require_rows(is_valid: Tensor, message: str, x: Tensor) -> Tensor:
    """Raise a ValueError that names an invalid row; assert on the device where reading waits.

    Args:
        is_valid: bool ``[B]``.
        message: The expectation.
        x: The tensor that depends on the check.

    Returns:
        ``x``, by way of `assert_in_graph` where values cannot be read.
    """
    if is_valid.device.type == "cpu" and not is_recorded(is_valid) and has_values(is_valid):
        if not is_valid.all():
            raise ValueError(f"{message}: not so in row {int(is_valid.long().argmin())}")
        return x
    return assert_in_graph(x, is_valid.all(), message)
