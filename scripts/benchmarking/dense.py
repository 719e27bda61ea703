"""Dense causal attention by every backend of the device: the baselines of sparse attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarking.inputs import QKV
from infllm_flex_ops import torch_private
from infllm_flex_ops.sizes import ceil_div, group_size

_CUDA_BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_MAX_GRAPHS = 200
_BLOCK = 128


class Baseline(NamedTuple):
    """An attention with its tensors bound.

    Attributes:
        attend: Runs it.
        qkv: The tensors, which collect gradients where a backward follows.
    """

    attend: Callable[[], Tensor]
    qkv: QKV


def dense_attentions(
    qkv: QKV, names: Collection[str] = ()
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Find the dense attentions that support these tensors.

    Args:
        qkv: The tensors. Device, dtype and shape decide.
        names: The attentions to try; empty: all.

    Returns:
        The available attentions by name, and the reason for each of the others.
    """
    if qkv.query.device.type != "cuda":
        return {"sdpa": Baseline(lambda: _sdpa(qkv), qkv)}, {}
    wanted = {name: _with_backend(backend, qkv) for name, backend in _CUDA_BACKENDS.items()}
    wanted["flex_dense"] = Baseline(_dense_flex(qkv), qkv)
    available, unavailable = {}, {}
    for name, dense in wanted.items():
        if names and name not in names:
            continue
        try:
            with warnings.catch_warnings():  # a backend warns before it raises
                warnings.simplefilter("ignore")
                dense.attend()
            available[name] = dense
        except (RuntimeError, NotImplementedError) as error:
            unavailable[name] = f"not supported: {str(error).splitlines()[0]}"
    return available, unavailable


def _sdpa(qkv: QKV) -> Tensor:
    is_grouped = qkv.query.shape[1] != qkv.key.shape[1]
    return F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=is_grouped)


def _with_backend(backend: SDPBackend, qkv: QKV) -> Baseline:
    query, key, value = qkv
    if backend == SDPBackend.EFFICIENT_ATTENTION:  # has no grouped queries: repeat the KV heads
        G = group_size(query.shape[1], key.shape[1])
        qkv = QKV(query, *(_repeated(x, G) for x in (key, value)))

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(qkv)

    return Baseline(attend, qkv)


def _repeated(x: Tensor, G: int) -> Tensor:
    """Repeat heads into a new leaf. This copy is not timed, which favours the baseline."""
    return x.detach().repeat_interleave(G, dim=1).requires_grad_(x.requires_grad)


def _dense_flex(qkv: QKV) -> Callable[[], Tensor]:
    S, device = qkv.query.shape[2], qkv.query.device
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None

    def attend() -> Tensor:
        nonlocal block_mask
        if block_mask is None:
            block_mask = _causal_blocks(S, device)
        # Every shape has a graph of its own. Beyond the limit PyTorch would run it uncompiled.
        with torch_private.recompile_limit(_MAX_GRAPHS, strict=True):
            return compiled(*qkv, block_mask=block_mask, enable_gqa=True)

    return attend


def _causal_blocks(S: int, device: torch.device) -> BlockMask:
    """Build the causal mask directly; deriving it from ``mask_mod`` needs memory or compilation."""
    block = torch.arange(ceil_div(S, _BLOCK), dtype=torch.int32, device=device)
    num_blocks = len(block)
    square = (1, 1, num_blocks, num_blocks)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=torch.ones_like(block).view(1, 1, -1),
        kv_indices=block[:, None].expand(square).contiguous(),  # the diagonal block
        full_kv_num_blocks=block.view(1, 1, -1),
        full_kv_indices=block.expand(square).contiguous(),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_causal,
        seq_lengths=(S, S),
    )


def _causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx
