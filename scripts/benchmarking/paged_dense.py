"""Dense attention over a cache in pages: the baselines of sparse attention over the same pages.

Two kinds: a gather of each row's pages into one piece with dense attention over it, and other
packages' attention that reads pages by itself. All read the very pages that our attention reads.
Each is checked before its clock. Descriptors that a server makes once per step for all layers are
not timed, which favours the baselines.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarking.correctness import CHECKED_QUERIES, check_error, plain_attention
from benchmarking.inputs import QKV
from benchmarking.packages import UnavailableError, attempt, import_installed
from benchmarking.paged import Pages
from benchmarking.report import DENSE_PAGED
from benchmarking.timing import Subject, in_turn
from infllm_flex import reference
from infllm_flex_ops.sizes import group_size

_WORKSPACE = 512 << 20  # bytes; FlashInfer's documentation recommends 128 MiB for common batches
_FLASH_3 = ("flash_attn_interface", "fa3_fwd_interface")  # modules of FlashAttention 3
_BACKENDS: dict[str, dict[str, SDPBackend | None]] = {
    "cpu": {"sdpa_gathered": None},
    "cuda": {
        "sdpa_cudnn_gathered": SDPBackend.CUDNN_ATTENTION,
        "sdpa_flash_gathered": SDPBackend.FLASH_ATTENTION,
    },
}

Attend = Callable[[], Tensor]


class _Candidate(NamedTuple):
    """A dense attention.

    Attributes:
        op: Its operation in the table: over pages, or over one piece.
        name: Its name in the table.
        prepare: Returns it with tensors bound; its output is ``[B * n, Hq, D]``.
    """

    op: str
    name: str
    prepare: Callable[[], Attend]


def paged_dense_subjects(
    layers: Sequence[QKV],
    pages: Sequence[Pages],
    names: Collection[str] = (),
    prepare: Callable[[Sequence[Attend]], Callable[[], Any]] = in_turn,
    *,
    has_packages: bool,
) -> tuple[list[Subject], dict[str, str]]:
    """Prepare the dense attentions over pages that work here, and check them.

    FlashAttention 3 is timed over one piece, too: a package may have been built without pages.

    Args:
        layers: The tensors from which the pages were filled, of each layer; all equal.
        pages: The pages of each layer.
        names: The attentions to prepare; empty: all.
        prepare: Turns the attentions of all layers into what is timed, such as a CUDA graph.
        has_packages: Whether to try the packages, which need a GPU, beside the gathers.

    Returns:
        The subjects, and the reason for each of the others, as `packages.attempt` gives it.
    """
    subjects, unavailable = [], {}
    exact = _Expected(layers[0])
    candidates = [
        [*_gathers(own), *(_packages(qkv, own) if has_packages else ())]
        for qkv, own in zip(layers, pages, strict=True)
    ]
    for candidate, *others in zip(*candidates, strict=True):
        if names and candidate.name not in names:
            continue
        several = [candidate, *others]
        run, reason = attempt(functools.partial(_prepare, several, exact, prepare))
        if run is None:
            unavailable[candidate.name] = reason
        else:
            subjects.append(Subject(candidate.op, candidate.name, run))
    return subjects, unavailable


def _gathers(pages: Pages) -> Iterator[_Candidate]:
    make_gather = functools.cache(functools.partial(_make_gather, pages))
    for name, backend in _BACKENDS[pages.both.device.type].items():
        prepare = functools.partial(_gathered, pages, make_gather, backend)
        yield _Candidate(DENSE_PAGED, name, prepare)


def _packages(qkv: QKV, pages: Pages) -> Iterator[_Candidate]:
    yield _Candidate("dense", "flash_attn_3", functools.partial(_flash_3, qkv))
    yield _Candidate(DENSE_PAGED, "flash_attn_3_paged", functools.partial(_flash_3_paged, pages))
    yield _Candidate(DENSE_PAGED, "flashinfer_paged", functools.partial(_flashinfer, pages))
    yield _Candidate(DENSE_PAGED, "varlen_attn_paged", functools.partial(_varlen_attn, pages))


def _prepare(
    layers: Sequence[_Candidate],
    exact: _Expected,
    prepare: Callable[[Sequence[Attend]], Callable[[], Any]],
) -> Callable[[], Any]:
    with warnings.catch_warnings(), torch.no_grad():  # a backend warns before it raises
        warnings.simplefilter("ignore")
        attentions = [torch.no_grad()(candidate.prepare()) for candidate in layers]
        for attend in attentions:
            exact.check(attend())
        return prepare(attentions)


class _Expected:
    """The output of dense attention in float64, for the last queries of the first and last row."""

    def __init__(self, qkv: QKV) -> None:
        self._qkv = qkv

    def check(self, out: Tensor) -> None:
        """Check an output ``[B * n, Hq, D]``.

        Raises:
            IncorrectError: It differs by more than rounding.
        """
        B, _, n, _ = self._qkv.query.shape
        for row, (exact, plain) in self._rows.items():
            last = out.unflatten(0, (B, n))[row, -exact.shape[2] :].transpose(0, 1)[None]
            check_error(f"output of row {row}", last, exact, plain)

    @functools.cached_property
    def _rows(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {row: self._of_row(row) for row in sorted({0, len(self._qkv.key) - 1})}

    def _of_row(self, row: int) -> tuple[Tensor, Tensor]:
        query, key, value = (x[row : row + 1].detach() for x in self._qkv)
        query, S = query[:, :, -CHECKED_QUERIES:], key.shape[2]
        position = torch.arange(S - query.shape[2], S, device=key.device)[:, None]
        mask = (torch.arange(S, device=key.device) <= position).expand(1, key.shape[1], -1, -1)
        exact = reference.masked_attention(query, key, value, mask, scale=query.shape[-1] ** -0.5)
        return exact, plain_attention(query, key, value, mask)


def _make_gather(pages: Pages) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that copies every row's pages into one piece.

    A page of one head is one row of memory, keys and values together, so that one copy of whole
    rows does it.
    """
    P, Hkv, page_size, width = pages.both.shape
    (B, count), D = pages.table.shape, pages.query.shape[-1]
    rows = pages.both.view(P * Hkv, page_size * width)
    head = torch.arange(Hkv, device=pages.table.device)[:, None]
    index = (pages.table[:, None] * Hkv + head).flatten()  # [B, Hkv, count]
    piece = rows.new_empty(len(index), page_size * width)

    def gather() -> tuple[Tensor, Tensor]:
        torch.index_select(rows, 0, index, out=piece)
        both = piece.view(B, Hkv, count * page_size, width)[:, :, : pages.length]
        return both[..., :D], both[..., D:]

    return gather


def _gathered(
    pages: Pages,
    make_gather: Callable[[], Callable[[], tuple[Tensor, Tensor]]],
    backend: SDPBackend | None,
) -> Attend:
    """Prepare a gather and SDPA over the piece."""
    gather, n, S = make_gather(), pages.num_queries, pages.length
    if n not in (1, S):
        raise NotImplementedError(f"expected one query or {S}, got {n}")
    query = pages.query.unflatten(0, (-1, n)).transpose(1, 2).contiguous()  # [B, Hq, n, D]

    def attend() -> Tensor:
        key, value = gather()
        is_grouped = query.shape[1] != key.shape[1]
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=n > 1, enable_gqa=is_grouped
            )
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def _flash_3(qkv: QKV) -> Attend:
    """Prepare FlashAttention 3 over one piece."""
    function = import_installed(*_FLASH_3).flash_attn_with_kvcache
    query, key, value = (x.detach().transpose(1, 2) for x in qkv)  # [B, S, H, D]
    query = query.contiguous()
    return lambda: function(query, key, value, causal=True).flatten(0, 1)


def _flash_3_paged(pages: Pages) -> Attend:
    function = import_installed(*_FLASH_3).flash_attn_with_kvcache
    query = pages.query.unflatten(0, (-1, pages.num_queries))
    key, value = (x.transpose(1, 2) for x in (pages.key, pages.value))  # [P, page_size, Hkv, D]
    lengths, table = pages.lengths, pages.table

    def attend() -> Tensor:
        out: Tensor = function(
            query, key, value, cache_seqlens=lengths, page_table=table, causal=True
        )
        return out.flatten(0, 1)

    return attend


def _flashinfer(pages: Pages) -> Attend:
    """Prepare FlashInfer's wrapper for decoding, or for prompts where rows have many queries."""
    module = import_installed("flashinfer")
    (B, count), device = pages.table.shape, pages.table.device
    _, Hkv, page_size, _ = pages.both.shape
    _, Hq, D = pages.query.shape
    workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
    first = torch.arange(B + 1, dtype=torch.int32, device=device) * count
    indices = pages.table.flatten()
    last = pages.lengths - (count - 1) * page_size
    if pages.num_queries == 1:
        buffers = (torch.empty_like(x) for x in (first, indices, last))
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", True, group_size(Hq, Hkv) >= 4, *buffers
        )
        wrapper.plan(first, indices, last, Hq, Hkv, D, page_size, q_data_type=pages.query.dtype)
    else:
        start = torch.arange(B + 1, dtype=torch.int32, device=device) * pages.num_queries
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(
            *(start, first, indices, last, Hq, Hkv, D, page_size),
            causal=True,
            q_data_type=pages.query.dtype,
        )
    return lambda: wrapper.run(pages.query, (pages.key, pages.value))


def _varlen_attn(pages: Pages) -> Attend:
    """Prepare PyTorch's own attention over pages, which it has since 2.12."""
    function = import_installed("torch.nn.attention.varlen").varlen_attn
    if "block_table" not in inspect.signature(function).parameters:
        raise UnavailableError(
            f"wrong version: varlen_attn of torch {torch.__version__} has no block_table, "
            "which torch 2.12 brings"
        )
    n = pages.num_queries
    start = torch.arange(len(pages.table) + 1, dtype=torch.int32, device=pages.table.device) * n
    key, value = (x.transpose(1, 2) for x in (pages.key, pages.value))  # [P, page_size, Hkv, D]
    return lambda: function(
        *(pages.query, key, value, start, None, n, pages.length),
        window_size=(-1, 0),
        enable_gqa=pages.query.shape[1] != key.shape[2],
        seqused_k=pages.lengths,
        block_table=pages.table,
    )
