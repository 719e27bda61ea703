"""Native sparse attention by ``fla``, where it is installed: a sparse baseline."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarking.dense import Baseline
from benchmarking.inputs import QKV
from infllm_flex.config import InfLLMConfig
from infllm_flex.selection import select_blocks

# The settings of the paper, arXiv 2502.11089.
_BLOCKS, _BLOCK_SIZE, _WINDOW = 16, 64, 512
_GATE = 0.5


def nsa_attentions(
    qkv: QKV, config: InfLLMConfig, names: Collection[str] = ()
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Prepare ``fla``'s attention with its own settings, and with our selection.

    ``fla_nsa_16_blocks``: compressed keys, the 16 blocks selected by them, and a window of 512
    tokens, each with a gate. fla computes the window by flash_attn. Where flash_attn is missing,
    the window is left out, which saves time, and the name ends in ``_no_window``.
    ``fla_nsa_given_96_blocks``, named by our budget: our selection, then fla's attention to these
    blocks only, which is the computation of ``infllm_attention``.

    Args:
        qkv: Tensors on a GPU. If they collect gradients, the backward is tried, too.
        config: Settings of our selection.
        names: The attentions to prepare; empty: both.

    Returns:
        The available attentions by name, and the reason for each of the others. Outputs and leaves
        have fla's layout ``[B, S, H, D]``.
    """
    if importlib.util.find_spec("fla") is None:
        return {}, {"fla_nsa": "not installed: fla"}
    try:
        with warnings.catch_warnings():  # fla warns about optional packages
            warnings.simplefilter("ignore")
            nsa = importlib.import_module("fla.ops.nsa.parallel")
    except ImportError as error:
        return {}, {"fla_nsa": f"wrong version: {error}"}
    leaves = QKV(*(_by_token(x) for x in qkv))
    window = 0 if nsa.flash_attn_func is None else _WINDOW
    wanted = {
        f"fla_nsa_{_BLOCKS}_blocks" + ("" if window else "_no_window"): _own_selection(
            nsa, leaves, window
        ),
        f"fla_nsa_given_{config.num_selected}_blocks": _our_selection(nsa, leaves, qkv, config),
    }
    available, unavailable = {}, {}
    for name, attend in wanted.items():
        if names and name not in names:
            continue
        try:
            out = attend()
            if out.requires_grad:
                torch.autograd.grad(out, leaves, torch.zeros_like(out))
            available[name] = Baseline(attend, leaves)
        except Exception as error:  # fla raises assertions, Triton errors and others
            unavailable[name] = f"not supported: {(str(error) or repr(error)).splitlines()[0]}"
    return available, unavailable


def _by_token(x: Tensor) -> Tensor:
    """Copy ``[B, H, S, D]`` into a leaf in fla's layout. This copy is not timed."""
    return x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad)


def _own_selection(nsa: Any, leaves: QKV, window: int) -> Callable[[], Tensor]:
    # The gates get no gradients, which favours the baseline.
    gate = torch.full_like(leaves.query[..., 0], _GATE, requires_grad=False)
    options = {"block_counts": _BLOCKS, "block_size": _BLOCK_SIZE, "window_size": window}
    return lambda: nsa.parallel_nsa(*leaves, g_cmp=gate, g_slc=gate, g_swa=gate, **options)


def _our_selection(nsa: Any, leaves: QKV, qkv: QKV, config: InfLLMConfig) -> Callable[[], Tensor]:
    def attend() -> Tensor:
        selected = select_blocks(qkv.query, qkv.key, config)
        slots = 1 << (selected.shape[-1] - 1).bit_length()  # fla's backward needs a power of two
        indices = F.pad(selected, (0, slots - selected.shape[-1]), value=-1)
        return nsa.parallel_nsa(
            *leaves,
            block_indices=indices.transpose(1, 2).contiguous(),
            block_counts=(selected >= 0).sum(-1).transpose(1, 2).contiguous(),
            block_size=config.block_size,
        )

    return attend
