"""The definition of a selection over whole sequences, tile by tile; no operator itself."""

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex_ops.in_parallel import in_parallel
from infllm_flex_ops.selection.block_scores import (
    list_all_blocks,
    pool_to_blocks,
    rank_blocks,
    score_windows,
    topk_blocks,
)
from infllm_flex_ops.selection.documents import Sequence, check_documents, list_sequences
from infllm_flex_ops.selection.rule import SelectionRule, Windows
from infllm_flex_ops.sizes import ceil_div

TILE_ROWS = 512  # query rows (tokens x group) scored at a time: scores take rows x C


class _Keys(NamedTuple):
    """Keys of one KV head: ``[C, D]`` and ``[C2, D]``; no coarse ones if queries are pooled."""

    compressed: Tensor
    coarse: Tensor | None


def tokens_per_tile(G: int) -> int:
    """Tokens that are scored together; tiles start at multiples of it."""
    return max(16, TILE_ROWS // G)


def select_in_tiles(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    kv_len: int,
    rule: SelectionRule,
    scale: float,
    documents: Tensor | None,
) -> Tensor:
    """Select the blocks of every query, as ``select_blocks`` describes it.

    Args:
        q: Queries ``[B, Hkv, Sq, G, D]``.
        compressed: ``[B, Hkv, C, D]``.
        coarse: ``[B, Hkv, C2, D]``; None if the queries are pooled, with G = 1.
        kv_len: Keys in the sequence.
        rule: Settings.
        scale: Factor on the dot products; has no effect on pooled queries.
        documents: The sequences of a padded or packed batch.
    """
    B, Hkv, Sq = q.shape[:3]
    check_documents(documents, kv_len, Sq)
    K = rule.num_slots(kv_len)
    selected = torch.empty(B, Hkv, Sq, K, dtype=torch.int32, device=q.device)
    if documents is not None:
        selected.fill_(-1)
    for b in range(B):
        for sequence in list_sequences(documents, b, kv_len, K):
            for h in range(Hkv):
                keys = _Keys(compressed[b, h], None if coarse is None else coarse[b, h])
                out = selected[b, h]
                _select_in_sequence(q[b, h], keys, kv_len - Sq, sequence, rule, scale, out)
    return selected


def _select_in_sequence(
    q: Tensor,
    keys: _Keys,
    q_offset: int,
    sequence: Sequence,
    rule: SelectionRule,
    scale: float,
    out: Tensor,
) -> None:
    """Fill a sequence's rows of ``out [Sq, K]`` as if the sequence came alone.

    Args:
        q: Queries ``[Sq, G, D]`` of all sequences.
        keys: Keys of all sequences.
        q_offset: Position of the first query.
        sequence: The sequence.
        rule: Settings.
        scale: Factor on the dot products.
        out: Lists of all queries.
    """
    start, end, budget = sequence
    q_start = max(start, q_offset)
    if q_start >= end:
        return
    rows = slice(q_start - q_offset, end - q_offset)
    accumulate = torch.promote_types(q.dtype, torch.float32)

    def own_windows(x: Tensor, windows: Windows) -> Tensor:
        window = start // windows.stride
        return x[window : window + windows.num_visible(end - start - 1)].to(accumulate)

    coarse = keys.coarse
    if coarse is not None:
        coarse = own_windows(coarse, rule.coarse_windows)
    keys = _Keys(own_windows(keys.compressed, rule.windows), coarse)
    selected = out[rows, :budget]
    _select_for_head(q[rows], keys, q_start - start, rule, scale, selected)
    selected.add_(start // rule.block_size * (selected >= 0))


def _select_for_head(
    q: Tensor, keys: _Keys, q_offset: int, rule: SelectionRule, scale: float, out: Tensor
) -> None:
    """Fill ``out [Sq, K]`` for queries ``q [Sq, G, D]`` from position ``q_offset`` on."""
    (Sq, G, _), K = q.shape, out.shape[-1]
    tokens, end = tokens_per_tile(G), q_offset + Sq
    keys = _pad_keys(keys, ceil_div(end, tokens) * tokens, rule)
    num_columns = len(keys.compressed) + (0 if keys.coarse is None else len(keys.coarse))
    # Kept from tile to tile: fresh pages for each tile would cost as much as the products.
    kept = threading.local()

    def fill(start: int) -> None:
        lo, hi = max(start, q_offset), min(start + tokens, end)
        rows = slice(lo - q_offset, hi - q_offset)
        if (hi - 1) // rule.block_size < K:  # every block up to the query's own fits
            out[rows] = list_all_blocks(range(lo, hi), K, rule, q.device)
            return
        if not hasattr(kept, "scratch"):
            kept.scratch = keys.compressed.new_empty(tokens * G * num_columns)
        tile = keys.compressed.new_zeros(tokens, *q.shape[1:])
        used = slice(lo - start, hi - start)
        tile[used] = q[rows]
        positions = range(start, start + tokens)
        scores = _score_tile(tile, keys, positions, rule, scale, kept.scratch)
        out[rows] = topk_blocks(scores[used], range(lo, hi), K, rule)

    # The last tiles see most keys and take longest. They go first, so that no thread is left with
    # a long one at the end.
    starts = range(q_offset // tokens * tokens, end, tokens)
    in_parallel(fill, reversed(starts))


def _pad_keys(keys: _Keys, position: int, rule: SelectionRule) -> _Keys:
    """Pad keys with zeros up to all windows that are scored for a query at ``position``."""

    def pad(x: Tensor, num_rows: int) -> Tensor:
        return F.pad(x, (0, 0, 0, max(0, num_rows - x.shape[0])))

    coarse = keys.coarse
    if coarse is not None:
        coarse = pad(coarse, rule.coarse_windows.num_scored(position))
    return _Keys(pad(keys.compressed, rule.windows.num_scored(position)), coarse)


def _score_tile(
    tile: Tensor,
    keys: _Keys,
    positions: range,
    rule: SelectionRule,
    scale: float,
    scratch: Tensor,
) -> Tensor:
    """Score blocks for ``tile [T, G, D]``, which is overwritten: ``[T, num_blocks]``."""
    num_blocks = positions[-1] // rule.block_size + 1
    if keys.coarse is None:
        logits = _multiply(tile, keys.compressed, rule.windows, positions, scratch)
        return rank_blocks(logits[:, 0], positions, num_blocks, rule)
    tile.mul_(scale)
    logits = _multiply(tile, keys.compressed, rule.windows, positions, scratch)
    rest = scratch[logits.numel() :]
    coarse_logits = _multiply(tile, keys.coarse, rule.coarse_windows, positions, rest)
    return pool_to_blocks(score_windows(logits, coarse_logits, positions, rule), num_blocks, rule)


def _multiply(
    tile: Tensor, keys: Tensor, windows: Windows, positions: range, scratch: Tensor
) -> Tensor:
    """Multiply ``tile [T, G, D]`` with the ``keys`` it sees, into ``scratch``: ``[T, G, C']``."""
    T, G, D = tile.shape
    C = windows.num_scored(positions[-1])
    logits = scratch[: T * G * C].view(T * G, C)
    torch.mm(tile.view(T * G, D), keys[:C].t(), out=logits)
    return logits.view(T, G, C)
