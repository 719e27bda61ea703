"""Choose the blocks of keys that each query attends to."""

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.in_parallel import in_parallel
from infllm_flex_ops.selection.block_scores import (
    Rule,
    Windows,
    list_all,
    pick_best,
    pool_to_blocks,
    rank_blocks,
    weigh_windows,
)
from infllm_flex_ops.transforms import register_vmap

_TILE_ROWS = 512  # query rows (tokens x group) scored at a time: memory is rows x C


@define_operator()
def select_blocks(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    kv_len: int,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    scale: float,
    documents: Tensor | None = None,
) -> Tensor:
    """Pick the best blocks of every query by their compressed keys, shared by its query group.

    A row's bits depend on its position and on what it sees alone: queries are scored in tiles that
    start at fixed positions and have fixed shapes, whatever the batch, the chunk or the length.

    Args:
        q: Queries ``[B, Hq, Sq, D]``, the last ``Sq`` of ``kv_len`` positions.
        compressed: Compressed keys ``[B, Hkv, C, D]`` of windows of ``kernel_size`` tokens every
            ``kernel_stride``.
        coarse: Coarse keys ``[B, Hkv, C2, D]`` of ``coarse_size`` every ``coarse_stride``; their
            log-sum-exp normalises the scores. The compressed keys again make it exact.
        kv_len: Keys in the sequence.
        kernel_size: Pooling window of the compressed keys, in tokens.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens.
        coarse_stride: Step between their windows, in tokens.
        block_size: Keys per block, a multiple of ``kernel_stride``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        scale: Factor on the dot products.
        documents: The sequences of a padded or packed batch, each from a multiple of
            ``coarse_stride`` and ``block_size`` on: int32 ``[B, N, 3]`` for N equal parts of the
            ``kv_len`` positions, each of one sequence: its first position, the position after its
            last, and its budget, at most ``num_selected``. Its rows see nothing before it, their
            first blocks are its own; rows of no sequence select nothing. Queries start with a part.

    Returns:
        Selected blocks, int32 ``[B, Hkv, Sq, K]`` with ``K = min(num_selected, Nkv)``, ascending,
        unused slots last as -1. Ties go to the lower block; a NaN score counts as zero.
        No gradient flows.

    Raises:
        ValueError: if ``documents`` does not tell of equal parts, or the queries start within one.

    Source: arXiv 2509.24663, section 3; stage 1 of OpenBMB/infllmv2_cuda_impl.
    """
    B, Hq, Sq, _ = q.shape
    check_parts(documents, kv_len, Sq)
    Hkv = compressed.shape[1]
    K = min(num_selected, -(-kv_len // block_size))
    selected = torch.empty(B, Hkv, Sq, K, dtype=torch.int32, device=q.device)
    rule = Rule(
        Windows(kernel_size, kernel_stride),
        Windows(coarse_size, coarse_stride),
        block_size,
        init_blocks,
        local_blocks,
        scale,
    )
    grouped = q.unflatten(1, (Hkv, Hq // Hkv))  # [B, Hkv, G, Sq, D]
    if documents is not None:
        selected.fill_(-1)
    for b in range(B):
        for sequence in list_sequences(documents, b, kv_len, K):
            for h in range(Hkv):
                select_in_sequence(
                    grouped[b, h].transpose(0, 1),  # [Sq, G, D]
                    compressed[b, h],
                    coarse[b, h],
                    kv_len - Sq,
                    sequence,
                    rule,
                    selected[b, h],
                )
    return selected


register_vmap(select_blocks)


@select_blocks.register_fake
def _(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    kv_len: int,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    scale: float,
    documents: Tensor | None = None,
) -> Tensor:
    K = torch.sym_min(num_selected, (kv_len + block_size - 1) // block_size)
    return q.new_empty(q.shape[0], compressed.shape[1], q.shape[2], K, dtype=torch.int32)


cuda_launcher(select_blocks, "selection.kernels.select_blocks")


def check_parts(documents: Tensor | None, kv_len: int, num_queries: int) -> None:
    """Raise a ValueError unless the documents' parts are equal and the queries start with one."""
    if documents is None or kv_len == 0:
        return
    count, offset = documents.shape[1], kv_len - num_queries
    if count == 0 or kv_len % count or offset % (kv_len // count):
        raise ValueError(
            f"documents must tell of equal parts of kv_len = {kv_len}, and the queries must start "
            f"with one; got {count} parts and queries from position {offset} on"
        )


class Sequence(NamedTuple):
    """A sequence of a padded or packed batch."""

    first: int  # position of the first token
    end: int  # and after the last
    budget: int


def list_sequences(documents: Tensor | None, b: int, kv_len: int, budget: int) -> list[Sequence]:
    """List the sequences of a batch row: one, or those of the table."""
    if documents is None:
        return [Sequence(0, kv_len, budget)]
    parts = sorted({tuple(part) for part in documents[b].tolist()})
    return [Sequence(*part) for part in parts if part[0] < part[1]]


def select_in_sequence(
    rows: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    offset: int,
    sequence: Sequence,
    rule: Rule,
    out: Tensor,
) -> None:
    """Fill a sequence's rows of ``out [Sq, K]``, queries from position ``offset``, as if alone."""
    first, end, budget = sequence
    begin = max(first, offset)
    if begin >= end:
        return
    accumulate = torch.promote_types(rows.dtype, torch.float32)

    def own_windows(keys: Tensor, windows: Windows) -> Tensor:
        window = first // windows.stride
        own = keys[window : window + windows.seen_from(end - first - 1)]
        return own.to(accumulate)

    fine = own_windows(compressed, rule.windows)
    wide = None
    if coarse is not None:
        wide = own_windows(coarse, rule.coarse_windows)
    queries = slice(begin - offset, end - offset)
    chosen = out[queries, :budget]
    _select_for_head(rows[queries], fine, wide, begin - first, rule, chosen)
    chosen.add_(first // rule.block_size * (chosen >= 0))


def tokens_per_tile(G: int) -> int:
    """How many tokens are scored together; their tiles start at multiples of it."""
    return max(16, _TILE_ROWS // G)


def _select_for_head(
    rows: Tensor, compressed: Tensor, coarse: Tensor | None, first: int, rule: Rule, out: Tensor
) -> None:
    """Fill ``out [Sq, K]`` for queries ``rows [Sq, G, D]`` from position ``first``."""
    Sq, G, _ = rows.shape
    K = out.shape[-1]
    tokens = tokens_per_tile(G)
    end = first + Sq
    last_tile_end = -(-end // tokens) * tokens
    compressed = _pad_rows(compressed, rule.windows.scored_to(last_tile_end))
    num_columns = len(compressed)
    if coarse is not None:
        coarse = _pad_rows(coarse, rule.coarse_windows.scored_to(last_tile_end))
        num_columns += len(coarse)
    # Kept from tile to tile: fresh pages for each would cost as much as the products.
    kept_scratch = threading.local()

    def fill(start: int) -> None:
        lo, hi = max(start, first), min(start + tokens, end)
        if (hi - 1) // rule.block_size < K:  # every block up to the query's own fits
            out[lo - first : hi - first] = list_all(range(lo, hi), K, rule, rows.device)
            return
        if not hasattr(kept_scratch, "tensor"):
            kept_scratch.tensor = compressed.new_empty(tokens * G * num_columns)
        tile = compressed.new_zeros(tokens, *rows.shape[1:])
        kept = slice(lo - start, hi - start)
        tile[kept] = rows[lo - first : hi - first]
        positions = range(start, start + tokens)
        scratch = kept_scratch.tensor
        num_blocks = positions[-1] // rule.block_size + 1
        if coarse is None:
            logits = _multiply(tile, compressed, rule.windows, positions, scratch)[:, 0]
            scores = rank_blocks(logits, positions, num_blocks, rule)
        else:
            weights = _score_windows(
                tile.mul_(rule.scale), compressed, coarse, positions, rule, scratch
            )
            scores = pool_to_blocks(weights, num_blocks, rule)
        out[lo - first : hi - first] = pick_best(scores[kept], range(lo, hi), K, rule)

    # The last tiles see most and take longest: threads that are left over have short ones.
    starts = range(first // tokens * tokens, end, tokens)
    in_parallel(fill, reversed(starts))


def _pad_rows(keys: Tensor, num_rows: int) -> Tensor:
    return F.pad(keys, (0, 0, 0, max(0, num_rows - keys.shape[0])))


def _score_windows(
    tile: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    positions: range,
    rule: Rule,
    scratch: Tensor,
) -> Tensor:
    """Weigh the windows visible to a tile ``[T, G, D]``, summed over its group: ``[T, C']``."""
    logits = _multiply(tile, compressed, rule.windows, positions, scratch)
    rest = scratch[logits.numel() :]
    coarse_logits = _multiply(tile, coarse, rule.coarse_windows, positions, rest)
    return weigh_windows(logits, coarse_logits, positions, rule)


def _multiply(
    tile: Tensor, keys: Tensor, windows: Windows, positions: range, scratch: Tensor
) -> Tensor:
    """Multiply ``tile [T, G, D]`` with the ``keys`` that it sees, into ``scratch``: [T, G, C']."""
    T, G, D = tile.shape
    C = windows.scored_to(positions[-1])
    logits = scratch[: T * G * C].view(T * G, C)
    torch.mm(tile.view(T * G, D), keys[:C].t(), out=logits)
    return logits.view(T, G, C)
