"""Native sparse attention by ``fla``, where that is installed: sparse attention by others."""

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

# As in the paper, arXiv 2502.11089.
_BLOCKS, _BLOCK_SIZE, _WINDOW = 16, 64, 512
_GATE = 0.5


def nsa_attentions(
    qkv: QKV, config: InfLLMConfig, names: Collection[str] = ()
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Prepare ``fla``'s attention with its own settings, and with the blocks that we choose.

    ``fla_nsa_16_blocks``: compressed keys, the 16 blocks they choose, and a window of 512 tokens,
    each behind a gate. fla hands the window to flash_attn; without it the window is left out, which
    saves time, and the name says so.
    ``fla_nsa_given_96_blocks``, after our budget: our choice, then its attention to these blocks
    alone, which is what ``infllm_attention`` computes.

    Args:
        qkv: On a GPU. If they collect gradients, the backward is tried too.
        config: Whose choice and budget the second has.
        names: Which of them to prepare; none: both.

    Returns:
        The attentions by name, and the reasons of those that do not serve; none of either where
        fla is not installed. Their outputs and leaves are ``[B, S, H, D]``, as fla has them.
    """
    if importlib.util.find_spec("fla") is None:
        return {}, {}
    try:
        with warnings.catch_warnings():  # of what else could be installed
            warnings.simplefilter("ignore")
            nsa = importlib.import_module("fla.ops.nsa.parallel")
    except ImportError as error:
        return {}, {"fla_nsa": str(error)}
    leaves = QKV(*(_by_token(x) for x in qkv))
    window = 0 if nsa.flash_attn_func is None else _WINDOW
    wanted = {
        f"fla_nsa_{_BLOCKS}_blocks" + ("" if window else "_no_window"): _usual(nsa, leaves, window),
        f"fla_nsa_given_{config.num_selected}_blocks": _given(nsa, leaves, qkv, config),
    }
    serving, failing = {}, {}
    for name, attend in wanted.items():
        if names and name not in names:
            continue
        try:
            out = attend()
            if out.requires_grad:
                torch.autograd.grad(out, leaves, torch.zeros_like(out))
            serving[name] = Baseline(attend, leaves)
        except Exception as error:  # assertions, Triton's own: fla says in many ways what it lacks
            failing[name] = (str(error) or repr(error)).splitlines()[0]
    return serving, failing


def _by_token(x: Tensor) -> Tensor:
    """Lay ``[B, H, S, D]`` out as fla does, outside of what is timed, as a leaf of its own."""
    return x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad)


def _usual(nsa: Any, leaves: QKV, window: int) -> Callable[[], Tensor]:
    # Without gradients, as if the gates were no part of the model: the baseline's advantage.
    gate = torch.full_like(leaves.query[..., 0], _GATE, requires_grad=False)
    options = {"block_counts": _BLOCKS, "block_size": _BLOCK_SIZE, "window_size": window}
    return lambda: nsa.parallel_nsa(*leaves, g_cmp=gate, g_slc=gate, g_swa=gate, **options)


def _given(nsa: Any, leaves: QKV, qkv: QKV, config: InfLLMConfig) -> Callable[[], Tensor]:
    def attend() -> Tensor:
        selected = select_blocks(qkv.query, qkv.key, config)
        slots = 1 << (selected.shape[-1] - 1).bit_length()  # its backward wants a power of two
        indices = F.pad(selected, (0, slots - selected.shape[-1]), value=-1)
        return nsa.parallel_nsa(
            *leaves,
            block_indices=indices.transpose(1, 2).contiguous(),
            block_counts=(selected >= 0).sum(-1).transpose(1, 2).contiguous(),
            block_size=config.block_size,
        )

    return attend
