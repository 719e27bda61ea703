"""Find the sequences in a batch of transformers: by mask, by bounds, or by positions."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.batches import read_bounds
from infllm_flex.config import InfLLMConfig
from infllm_flex.layout import Layout, lay_out, layout_alignment
from infllm_flex.patch.huggingface.sequence_info import SequenceInfo, never_decreases
from infllm_flex.patch.huggingface.speculation import Speculation, read_flag
from infllm_flex.validation import assert_in_graph, has_values, is_recorded, require_rows

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


class Sequences:
    """Which tokens of a batch begin a sequence, and which are padding.

    Attributes:
        opens: bool ``[B, S]``, whether a sequence starts at this token.
        is_real: bool ``[B, S]``, false at padding.
        limit: Most sequences that a row can hold; None where only the device knows.
    """

    def __init__(
        self, opens: Tensor, is_real: Tensor, gaps: Tensor | None, limit: int | None
    ) -> None:
        self.opens = opens
        self.is_real = is_real
        self.limit = limit
        self._gaps = gaps  # tokens that continue a sequence after padding inside it
        self._layouts: dict[int, Layout] = {}

    def layout(self, config: InfLLMConfig) -> Layout:
        """Lay the sequences out for the blocks of ``config``."""
        alignment = layout_alignment(config)
        if alignment not in self._layouts:
            self._layouts[alignment] = self._lay_out(alignment)
        return self._layouts[alignment]

    def _lay_out(self, alignment: int) -> Layout:
        S, opens = self.opens.shape[1], self.opens
        if self._gaps is not None:
            opens = require_rows(~self._gaps.any(-1), _GAP, opens)
        if self.limit is not None:  # every start moves by at most alignment - 1
            room = (self.limit + (self._gaps is not None)) * (alignment - 1)
        else:
            room = max(S // 4, 8 * alignment)
        kv_len = (S + room + alignment - 1) // alignment * alignment
        layout = lay_out(opens, self.is_real, alignment, kv_len, S)
        if self.limit is None:
            fits = ((layout.place >= 0) == self.is_real).all()
            checked = assert_in_graph(layout.place, fits, _NO_ROOM)
            layout = dataclasses.replace(layout, place=checked)
        return layout

    def isolate(self, mask: Tensor | None) -> Tensor | None:
        """Hide other sequences in a mask for dense attention.

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


def find_sequences(
    query: Tensor, info: SequenceInfo, speculation: Speculation | None = None
) -> Sequences | None:
    """Find the sequences of a call; None for one whole sequence per row.

    Eager code waits for the device once per forward, as transformers itself does; in training for
    a number that was asked for when the forward began. A graph never waits.

    Args:
        query: ``[B, Hq, S, D]``.
        info: Information from the call.
        speculation: A call that may keep the device busy while the host waits for it.
    """
    if info.is_empty:
        return None
    B, S = query.shape[0], query.shape[2]
    if is_recorded(query):
        return _read(B, S, info)

    def read() -> Sequences | None:
        sequences = _read(B, S, info, speculation)
        if speculation is not None:
            speculation.note_result(sequences is not None)
        return sequences

    if info.forward is None:
        return read()
    tensors = (info.padding, info.positions, info.bounds, info.same_bounds)
    return info.forward.recall(("sequences", B), tensors, read)


def _read(
    B: int, S: int, info: SequenceInfo, speculation: Speculation | None = None
) -> Sequences | None:
    padding, positions, bounds, same_bounds, *_ = info
    first = next(x for x in (padding, positions, bounds) if x is not None)
    device, recorded = first.device, is_recorded(first)
    if positions is not None and not recorded and not has_values(positions):
        positions = None
        if padding is None and bounds is None:
            return None
    single = None if recorded else info.positions_only
    num_documents = None
    if single is not None and info.num_documents is not None:
        num_documents = info.num_documents.wait()
        if num_documents == 1:
            return None
    elif single is not None and read_flag(never_decreases(single), speculation):
        return None  # the common case, which needs no more than one flag
    # Not a constant: for a constant in a conjunction, PyTorch 2.11 writes C++ that is wrong.
    everything = (torch.arange(S, device=device) >= 0).expand(B, S)
    is_real = everything if padding is None else padding != 0
    follows = is_real & F.pad(is_real[:, :-1], (1, 0))  # a real token after another
    opens = is_real & (is_real.long().cumsum(-1) == 1)
    after_padding = is_real & ~follows & ~opens
    restarts = torch.zeros_like(opens)
    if positions is not None:
        restarts = _restarts(positions.expand(B, S), is_real, after_padding)
    limit: int | None = 1
    if bounds is not None:
        opens = opens | (_opens_at(bounds, same_bounds, B, S) & is_real)
        opens = require_rows((opens | ~restarts).all(-1), _CONTRADICTION, opens)
        limit = bounds.shape[0] - 1 + (padding is not None)
    elif positions is not None:
        opens = opens | restarts
        limit = num_documents
        if num_documents is None and not recorded:
            limit = max(1, int(opens.sum(-1).max()))
    if padding is None and limit == 1:
        return None
    return Sequences(opens, is_real, None if padding is None else after_padding & ~opens, limit)


def open_documents(positions: Tensor) -> Tensor:
    """Mark the tokens of ``positions [B, S]``, without padding, that begin a document."""
    is_real = torch.ones_like(positions, dtype=torch.bool)
    opens = is_real.long().cumsum(-1) == 1
    return opens | _restarts(positions, is_real, torch.zeros_like(is_real))


def _restarts(positions: Tensor, is_real: Tensor, after_padding: Tensor) -> Tensor:
    """Mark the real tokens with which a document begins, by positions: bool ``[B, S]``.

    A document begins where a position is less than that of the real token before. In a row that has
    such a token, 0 after 0 begins one, too: the document before has one token. 0 after padding
    begins one in any row.

    Args:
        positions: ``[B, S]``.
        is_real: bool ``[B, S]``.
        after_padding: bool ``[B, S]``, real tokens that follow padding that follows real ones.
    """
    token = torch.arange(positions.shape[1], device=positions.device)
    last_real = torch.where(is_real, token, -1).cummax(-1).values
    before = F.pad(last_real[:, :-1], (1, 0), value=-1)
    step = positions - positions.gather(-1, before.clamp(min=0))
    follows = is_real & (before >= 0)
    back = follows & (step < 0)
    at_zero = follows & (positions == 0)
    return back | (at_zero & (step == 0) & back.any(-1, keepdim=True)) | (at_zero & after_padding)


def _opens_at(bounds: Tensor, same_bounds: Tensor | None, B: int, S: int) -> Tensor:
    """Mark where documents start by ``bounds [N + 1]``: bool ``[1, S]``."""
    if B != 1 or bounds.dim() != 1:
        raise ValueError(
            f"cu_seq_lens_q packs documents in one row: expected [N + 1] and a batch of 1, "
            f"got {list(bounds.shape)} and a batch of {B}"
        )
    opens, is_valid = read_bounds(bounds, S)
    if same_bounds is not None and same_bounds is not bounds:
        is_valid = is_valid & (same_bounds == bounds).all()
    return require_rows(is_valid[None], _BOUNDS, opens)
