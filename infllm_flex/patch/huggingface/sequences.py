"""The sequences in a batch as transformers hands it over: by mask, by bounds, or by positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import custom_ops
from infllm_flex.batches import require
from infllm_flex.config import InfLLMConfig
from infllm_flex.layout import Layout, lay_out, layout_unit
from infllm_flex.patch.huggingface.masks import LazyMask
from infllm_flex.patch.huggingface.memo import Memo

_GAP = (
    "attention_mask must hold one run of ones per row, or position_ids that restart at 0 where "
    "another begins"
)
_BOUNDS = "cu_seq_lens_q must ascend from 0 to the length, and cu_seq_lens_k be the same"
_CONTRADICTION = "position_ids must restart only where cu_seq_lens_q lets a document begin"
_NO_ROOM = (
    "position_ids restart more often than a compiled graph has room for: pass the bounds of the "
    "documents as cu_seq_lens_q"
)
_LEAK = (
    "transformers would let documents told by position_ids alone see each other in this compiled "
    "call: pass use_cache=False or cu_seq_lens_q"
)
_memo: Memo[Sequences | None] = Memo()


class Sequences:
    """Which tokens of a batch begin a sequence, and which are padding.

    Attributes:
        opens: bool ``[B, S]``, whether a sequence starts at this token.
        is_real: bool ``[B, S]``, false at padding.
        limit: No row holds more of them; None where only the device knows.
    """

    def __init__(
        self, opens: Tensor, is_real: Tensor, gaps: Tensor | None, limit: int | None
    ) -> None:
        self.opens = opens
        self.is_real = is_real
        self.limit = limit
        self._gaps = gaps  # tokens that go on with a sequence after padding within it
        self._layouts: dict[int, Layout] = {}

    def layout(self, config: InfLLMConfig) -> Layout:
        """Lay them out for the blocks of ``config``."""
        unit = layout_unit(config)
        if unit not in self._layouts:
            self._layouts[unit] = self._lay_out(unit)
        return self._layouts[unit]

    def _lay_out(self, unit: int) -> Layout:
        S, opens = self.opens.shape[1], self.opens
        if self._gaps is not None:
            opens = require(~self._gaps.any(-1), _GAP, opens)
        if self.limit is not None:  # every start moves up by at most unit - 1
            room = (self.limit + (self._gaps is not None)) * (unit - 1)
        else:
            room = max(S // 4, 8 * unit)
        kv_len = (S + room + unit - 1) // unit * unit
        layout = lay_out(opens, self.is_real, unit, kv_len, S)
        if self.limit is None:
            fits = ((layout.place >= 0) == self.is_real).all()
            checked = layout.place + custom_ops.zero_if(fits, _NO_ROOM).long()
            layout = dataclasses.replace(layout, place=checked)
        return layout

    def isolate(self, mask: Tensor | None) -> Tensor | None:
        """Take other sequences out of a mask for dense attention, where it lets them in.

        Args:
            mask: bool or additive ``[B, 1, S, S]``, or None for causal.
        """
        if self.limit == 1:
            return mask
        sequence = self.opens.cumsum(-1)
        same = (sequence[:, :, None] == sequence[:, None])[:, None]
        if mask is None:
            return same & torch.ones_like(same).tril()
        if mask.dtype is torch.bool:
            return mask & same
        return mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def lone_positions(
    query: Tensor, key: Tensor, mask: LazyMask | Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The positions of a call where nothing else would tell of documents; else None."""
    positions = kwargs.get("position_ids")
    S = query.shape[2]
    if isinstance(mask, LazyMask):
        mask = None if mask.is_plain and mask.padding is None else mask
    if mask is not None or kwargs.get("cu_seq_lens_q") is not None or key.shape[2] != S:
        return None
    if positions is None or positions.dim() != 2 or positions.shape[-1] != S or S == 1:
        return None
    return cast(Tensor, positions)


def refuse_leak(query: Tensor, positions: Tensor) -> Tensor:
    """The query, and in the graph the check that no row of positions restarts.

    Taking the mask down for a graph's every call would cost all those that are not packed.
    """
    return query + custom_ops.zero_if((positions.diff(dim=-1) == 1).all(), _LEAK)


def find_sequences(
    query: Tensor,
    key: Tensor,
    mask: LazyMask | Tensor | None,
    kwargs: Mapping[str, Any],
    meanwhile: Callable[[], None] | None = None,
) -> Sequences | None:
    """Read the sequences of a call; None for one whole sequence per row, or with earlier keys.

    Eager, it waits for the device once per forward, as transformers itself does; compiled, never.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        mask: As handed to the attention function.
        kwargs: The other keywords of the call.
        meanwhile: Gives the device work for as long as it is waited for, in vain if there are
            several sequences; not called where there were several the last time.
    """
    B, S = query.shape[0], query.shape[2]
    if key.shape[2] != S:
        return None
    padding = mask.padding if isinstance(mask, LazyMask) else None
    bounds, same_bounds = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    positions = kwargs.get("position_ids")
    if positions is not None and (positions.dim() != 2 or positions.shape[-1] != S):
        positions = None  # rotary embeddings over images have more axes
    if padding is None and bounds is None and (positions is None or S == 1):
        return None
    given = (padding, positions, bounds, same_bounds)
    if torch.compiler.is_compiling():
        return _read(B, S, *given)
    if _memo.last_answer is not None:
        meanwhile = None
    return _memo.recall((B, S), given, lambda: _read(B, S, *given, meanwhile))


def _read(
    B: int,
    S: int,
    padding: Tensor | None,
    positions: Tensor | None,
    bounds: Tensor | None,
    same_bounds: Tensor | None,
    meanwhile: Callable[[], None] | None = None,
) -> Sequences | None:
    if padding is None and bounds is None and not torch.compiler.is_compiling():
        assert positions is not None  # or there was nothing to read
        if _wait_for((positions.diff(dim=-1) == 1).all(), meanwhile):
            return None  # as it mostly is, and quickly told
    device = next(x.device for x in (padding, positions, bounds) if x is not None)
    everything = torch.ones(B, S, dtype=torch.bool, device=device)
    is_real = everything if padding is None else padding != 0
    follows = is_real & F.pad(is_real[:, :-1], (1, 0))  # a real token after another
    opens = is_real & (is_real.long().cumsum(-1) == 1)
    after_padding = is_real & ~follows & ~opens
    restarts = torch.zeros_like(opens)
    if positions is not None:
        restarts = follows & (F.pad(positions.diff(dim=-1), (1, 0), value=1) != 1)
        restarts |= after_padding & (positions == 0)
    limit: int | None = 1
    if bounds is not None:
        opens = opens | (_open_at(bounds, same_bounds, B, S) & is_real)
        opens = require((opens | ~restarts).all(-1), _CONTRADICTION, opens)
        limit = bounds.shape[0] - 1 + (padding is not None)
    elif positions is not None:
        opens = opens | restarts
        limit = None if torch.compiler.is_compiling() else max(1, int(opens.sum(-1).max()))
    if padding is None and limit == 1:
        return None
    return Sequences(opens, is_real, None if padding is None else after_padding & ~opens, limit)


def _wait_for(flag: Tensor, meanwhile: Callable[[], None] | None) -> bool:
    """Read a flag; what ``meanwhile`` gives the device to do comes after it, and is not waited for.

    On one H100 the device else idles for 0.2 ms until the host has told it how to go on.
    """
    if meanwhile is None or not flag.is_cuda:
        return bool(flag)
    read = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
    is_read = torch.cuda.Event()
    is_read.record()
    meanwhile()
    is_read.synchronize()
    return bool(read)


def _open_at(bounds: Tensor, same_bounds: Tensor | None, B: int, S: int) -> Tensor:
    """Mark where ``bounds [N + 1]`` let a document start: bool ``[1, S]``."""
    if B != 1 or bounds.dim() != 1:
        raise ValueError(
            f"cu_seq_lens_q packs documents in one row: expected [N + 1] and a batch of 1, "
            f"got {list(bounds.shape)} and a batch of {B}"
        )
    right = (bounds.diff() >= 0).all() & (bounds[0] == 0) & (bounds[-1] == S)
    if same_bounds is not None and same_bounds is not bounds:
        right = right & (same_bounds == bounds).all()
    opens = torch.zeros(S + 1, dtype=torch.bool, device=bounds.device)
    opens = opens.scatter(0, bounds[:-1].long().clamp(0, S), True)[None, :S]
    return require(right[None], _BOUNDS, opens)
