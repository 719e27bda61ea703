"""Choose the blocks of keys that each query attends to."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops.without_autocast import without_autocast

_TILE_ROWS = 512  # query rows (tokens x group) scored at a time: memory is rows x C
_INVISIBLE = -1.0  # ranks below every score, since scores are sums of exponentials
_FIRST, _NEVER = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min


@torch.library.custom_op("infllm_flex::select_blocks", mutates_args=())
@without_autocast
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

    Source: arXiv 2509.24663, section 3; stage 1 of OpenBMB/infllmv2_cuda_impl.
    """
    B, Hq, Sq, _ = q.shape
    Hkv = compressed.shape[1]
    K = min(num_selected, -(-kv_len // block_size))
    selected = torch.empty(B, Hkv, Sq, K, dtype=torch.int32, device=q.device)
    rule = _Rule(
        _Windows(kernel_size, kernel_stride),
        _Windows(coarse_size, coarse_stride),
        block_size,
        init_blocks,
        local_blocks,
        scale,
    )
    grouped = q.unflatten(1, (Hkv, Hq // Hkv))  # [B, Hkv, G, Sq, D]
    if documents is not None:
        selected.fill_(-1)
    for b in range(B):
        for sequence in _sequences(documents, b, kv_len, K):
            for h in range(Hkv):
                _select_in_sequence(
                    grouped[b, h].transpose(0, 1),  # [Sq, G, D]
                    compressed[b, h],
                    coarse[b, h],
                    kv_len - Sq,
                    sequence,
                    rule,
                    selected[b, h],
                )
    return selected


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


@select_blocks.register_kernel("cuda")
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
    from custom_ops.kernels.select_blocks import launch

    return launch(
        q,
        compressed,
        coarse,
        kv_len,
        kernel_size,
        kernel_stride,
        coarse_size,
        coarse_stride,
        block_size,
        init_blocks,
        local_blocks,
        num_selected,
        scale,
        documents,
    )


class _Windows(NamedTuple):
    size: int
    stride: int

    def seen_from(self, position: int) -> int:
        """Count the windows that lie wholly at or before ``position``."""
        return max(0, (position + 1 - self.size) // self.stride + 1)


class _Rule(NamedTuple):
    windows: _Windows
    coarse_windows: _Windows
    block_size: int
    init_blocks: int
    local_blocks: int
    scale: float


class _Sequence(NamedTuple):
    first: int  # position of the first token
    end: int  # and after the last
    budget: int


def _sequences(documents: Tensor | None, b: int, kv_len: int, budget: int) -> list[_Sequence]:
    """List the sequences of a batch row: one, or those of the table."""
    if documents is None:
        return [_Sequence(0, kv_len, budget)]
    parts = sorted({tuple(part) for part in documents[b].tolist()})
    return [_Sequence(*part) for part in parts if part[0] < part[1]]


def _select_in_sequence(
    rows: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    offset: int,
    sequence: _Sequence,
    rule: _Rule,
    out: Tensor,
) -> None:
    """Fill a sequence's rows of ``out [Sq, K]``, queries from position ``offset``, as if alone."""
    first, end, budget = sequence
    begin = max(first, offset)
    if begin >= end:
        return
    accumulate = torch.promote_types(rows.dtype, torch.float32)

    def own_windows(keys: Tensor, windows: _Windows) -> Tensor:
        window = first // windows.stride
        own = keys[window : window + windows.seen_from(end - first - 1)]
        return own.to(accumulate) * rule.scale

    fine = own_windows(compressed, rule.windows)
    wide = own_windows(coarse, rule.coarse_windows)
    queries = slice(begin - offset, end - offset)
    chosen = out[queries, :budget]
    _select_for_head(rows[queries], fine, wide, begin - first, rule, chosen)
    chosen.add_(first // rule.block_size * (chosen >= 0))


def _select_for_head(
    rows: Tensor, compressed: Tensor, coarse: Tensor, first: int, rule: _Rule, out: Tensor
) -> None:
    """Fill ``out [Sq, K]`` for queries ``rows [Sq, G, D]`` from position ``first``, scaled keys."""
    Sq, G, _ = rows.shape
    K = out.shape[-1]
    tokens = max(16, _TILE_ROWS // G)
    end = first + Sq
    last_tile_end = -(-end // tokens) * tokens
    compressed = _pad_rows(compressed, rule.windows.seen_from(last_tile_end))
    coarse = _pad_rows(coarse, rule.coarse_windows.seen_from(last_tile_end))
    # Kept from tile to tile: fresh pages for each would cost as much as the products.
    scratch = compressed.new_empty(tokens * G * (len(compressed) + len(coarse)))
    for start in range(first // tokens * tokens, end, tokens):
        lo, hi = max(start, first), min(start + tokens, end)
        position = torch.arange(start, start + tokens, device=rows.device)
        num_candidates = (start + tokens - 1) // rule.block_size + 1
        kept = slice(lo - start, hi - start)
        if (hi - 1) // rule.block_size < K:  # every block up to the query's own fits
            block = torch.arange(K, device=rows.device)
            own = position[kept, None] // rule.block_size
            out[lo - first : hi - first] = torch.where(block <= own, block, -1)
            continue
        tile = compressed.new_zeros(tokens, *rows.shape[1:])
        tile[kept] = rows[lo - first : hi - first]
        weights = _score_windows(tile, compressed, coarse, position, rule, scratch)
        scores = _pool_to_blocks(weights, num_candidates, rule)
        out[lo - first : hi - first] = _pick_best(scores[kept], position[kept], K, rule)


def _pad_rows(keys: Tensor, num_rows: int) -> Tensor:
    return F.pad(keys, (0, 0, 0, max(0, num_rows - keys.shape[0])))


def _score_windows(
    tile: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    position: Tensor,
    rule: _Rule,
    scratch: Tensor,
) -> Tensor:
    """Weigh the windows visible to a tile ``[T, G, D]``, summed over its group: ``[T, C']``."""
    T, G, D = tile.shape
    start, last = int(position[0]), int(position[-1])
    q = tile.view(T * G, D)
    num_coarse = rule.coarse_windows.seen_from(last)
    num_fine = rule.windows.seen_from(last)
    logits = scratch[: T * G * num_fine].view(T * G, num_fine)
    torch.mm(q, compressed[:num_fine].t(), out=logits)
    coarse_logits = scratch[logits.numel() :][: T * G * num_coarse].view(T * G, num_coarse)
    torch.mm(q, coarse[:num_coarse].t(), out=coarse_logits)
    _hide_unseen(coarse_logits.view(T, G, -1), position, rule.coarse_windows, -torch.inf)
    lse = coarse_logits.logsumexp(-1)
    if rule.coarse_windows.seen_from(start) == 0:
        hidden = _hide_unseen(logits.view(T, G, -1).clone(), position, rule.windows, -torch.inf)
        sees_coarse = (position >= rule.coarse_windows.size - 1).repeat_interleave(G)
        lse = torch.where(sees_coarse, lse, hidden.view(T * G, -1).logsumexp(-1))
    weights = logits.sub_(lse[:, None]).exp_().view(T, G, -1).sum(1)  # [T, C']
    weights.nan_to_num_(nan=0.0, posinf=torch.finfo(torch.float32).max)
    return _hide_unseen(weights[:, None], position, rule.windows, _INVISIBLE)[:, 0]


def _hide_unseen(x: Tensor, position: Tensor, windows: _Windows, value: float) -> Tensor:
    """Overwrite in ``x [T, G, C']`` the windows that end after the token's position."""
    seen_by_all = windows.seen_from(int(position[0]))
    tail = x[:, :, seen_by_all:]
    ends = torch.arange(seen_by_all, x.shape[-1], device=x.device) * windows.stride
    unseen = ends + windows.size - 1 > position[:, None]
    tail.masked_fill_(unseen[:, None], value)
    return x


def _pool_to_blocks(weights: Tensor, num_blocks: int, rule: _Rule) -> Tensor:
    """Take each block's best overlapping window: ``[T, C'] -> [T, num_blocks]``, float32."""
    per_block = rule.block_size // rule.windows.stride
    overlap = rule.windows.size // rule.windows.stride - 1  # windows that begin before the block
    T, C = weights.shape
    padded = weights.new_full((T, overlap + num_blocks * per_block), _INVISIBLE)
    padded[:, overlap : overlap + C] = weights
    scores = padded[:, overlap:].unflatten(1, (num_blocks, per_block)).amax(-1)
    for before in range(1, overlap + 1):
        column = padded[:, overlap - before :: per_block][:, :num_blocks]
        torch.maximum(scores, column, out=scores)
    return scores.float()


def _pick_best(scores: Tensor, position: Tensor, K: int, rule: _Rule) -> Tensor:
    """Choose by forced first, score descending, block ascending: ``[T, Nkv'] -> [T, K]`` int32."""
    num_blocks = scores.shape[1]
    block = torch.arange(num_blocks, device=scores.device)
    own = position[:, None] // rule.block_size
    forced = (block < rule.init_blocks) | (block >= own - rule.local_blocks)
    # Non-negative floats order as their bits do, so bits above index make one unique key.
    key = scores.view(torch.int32).long() << 32 | (num_blocks - block)
    key = key.masked_fill_(forced, _FIRST).masked_fill_(block > own, _NEVER)
    best, index = key.topk(K, dim=-1, sorted=False)
    index = index.masked_fill_(best == _NEVER, num_blocks).sort(-1).values
    return torch.where(index == num_blocks, -1, index).int()
