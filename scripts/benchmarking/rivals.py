"""Other packages' sparse attention over the blocks that we select, each checked before its clock.

None of them selects blocks here: `select_blocks` does, and its time counts as in our own rows. A
package's preparation on the host and its copies into its own layout are not timed, which favours
it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarking.correctness import (
    CHECKED_QUERIES,
    IncorrectError,
    check_error,
    plain_attention,
)
from benchmarking.dense import Baseline
from benchmarking.inputs import QKV
from benchmarking.packages import UnavailableError, attempt, import_installed
from infllm_flex import reference
from infllm_flex.attention import infllm_attention
from infllm_flex.config import InfLLMConfig
from infllm_flex.selection import select_blocks
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.sizes import group_size

_WORKSPACE = 128 << 20  # bytes, as FlashInfer's documentation recommends
_ROWS = 64  # queries, folded with the heads of a group, that share a list in cuDNN's kernel


class Prepared(NamedTuple):
    """A package's attention with tensors bound.

    Attributes:
        attend: Runs it, in the package's own layout.
        leaves: Its tensors, which collect gradients where a backward follows.
        standard: Brings its output, and gradients of its leaves, to ``[B, H, S, D]``. Not timed.
        seen: Which keys the last queries see, ``[B, Hkv, n, S]``; None: those of our selection.
    """

    attend: Callable[[], Tensor]
    leaves: QKV
    standard: Callable[[Tensor], Tensor]
    seen: Tensor | None = None


class Rival(NamedTuple):
    """A package.

    Attributes:
        form: Its name in the table, with a place for the number of blocks.
        module: The module that holds its function.
        prepare: Binds tensors to it.
        has_backward: Whether it has gradients.
    """

    form: str
    module: str
    prepare: Callable[[Any, QKV, InfLLMConfig], Prepared]
    has_backward: bool


def rival_attentions(
    qkv: QKV, config: InfLLMConfig, names: Collection[str] = ()
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Prepare the packages that are installed, and check them.

    Args:
        qkv: The tensors; if they collect gradients, the backward is checked, too.
        config: Settings of our selection.
        names: The packages to prepare; empty: all.

    Returns:
        The packages that can be timed, by name, and for each of the others the reason, as
        `packages.attempt` gives it.
    """
    available, unavailable = {}, {}
    for rival in RIVALS:
        name = rival.form.format(config.num_selected)
        if names and name not in names:
            continue
        baseline, reason = attempt(functools.partial(_prepare, rival, qkv, config))
        if baseline is None:
            unavailable[name] = reason
        else:
            available[name] = baseline
    return available, unavailable


def _prepare(rival: Rival, qkv: QKV, config: InfLLMConfig) -> Baseline:
    module = import_installed(rival.module)
    if qkv.query.requires_grad and not rival.has_backward:
        raise UnavailableError("not supported: forward only")
    prepared = rival.prepare(module, qkv, config)
    _check(prepared, qkv, config)
    return Baseline(prepared.attend, prepared.leaves)


def _check(prepared: Prepared, qkv: QKV, config: InfLLMConfig) -> None:
    """Compare the last queries' output with float64, and gradients with ours.

    Raises:
        IncorrectError: They differ by more than rounding.
    """
    query, key, value = (x.detach() for x in qkv)
    out = prepared.attend()
    n = min(CHECKED_QUERIES, query.shape[2])
    if prepared.seen is None:
        selected = select_blocks(query, key, config)[:, :, -n:]
        mask = reference.attention_mask(selected, config.block_size, key.shape[2])
    else:
        mask = prepared.seen[:, :, -n:]
    mask = mask.to(query.device)
    last, scale = query[:, :, -n:], query.shape[-1] ** -0.5
    exact = reference.masked_attention(last, key, value, mask, scale=scale)
    plain = plain_attention(last, key, value, mask)
    check_error("output", prepared.standard(out.detach())[:, :, -n:], exact, plain)
    if out.requires_grad:
        _check_gradients(prepared, out, qkv, config)


def _check_gradients(prepared: Prepared, out: Tensor, qkv: QKV, config: InfLLMConfig) -> None:
    grad_out = torch.randn_like(out)
    theirs = torch.autograd.grad(out, prepared.leaves, grad_out)
    ours = torch.autograd.grad(infllm_attention(*qkv, config), qkv, prepared.standard(grad_out))
    limit = 8 * torch.finfo(out.dtype).eps
    for name, raw, expected in zip(("dq", "dk", "dv"), theirs, ours, strict=True):
        difference = prepared.standard(raw).double() - expected.double()
        error = (difference.norm() / expected.double().norm()).item()
        if not error <= limit:
            raise IncorrectError(f"{name} differs from ours by {error:.3g}, allowed {limit:.3g}")


def _one_row(qkv: QKV) -> None:
    if qkv.query.shape[0] != 1:
        raise NotImplementedError(f"expected batch 1, got {qkv.query.shape[0]}")


def _packed(qkv: QKV) -> QKV:
    """Copy ``[1, H, S, D]`` into leaves of packed sequences, ``[S, H, D]``. Not timed."""
    _one_row(qkv)
    return QKV(
        *(x.detach()[0].transpose(0, 1).contiguous().requires_grad_(x.requires_grad) for x in qkv)
    )


def _ends(length: int, device: torch.device) -> Tensor:
    return torch.tensor([0, length], dtype=torch.int32, device=device)


def _unpacked(out: Tensor) -> Tensor:
    return out.transpose(0, 1)[None]


def _folded(query: Tensor, Hkv: int) -> Tensor:
    """Bring the heads of a group together: ``[Hkv, S, G, D]``. Not timed."""
    return query[0].unflatten(0, (Hkv, -1)).transpose(1, 2).contiguous()


def _unfolded(out: Tensor, query: Tensor, Hkv: int) -> Tensor:
    """Undo `_folded`, whatever shape the output has."""
    Hq, S, D = query.shape[1:]
    return out.reshape(Hkv, S, Hq // Hkv, D).transpose(1, 2).reshape(1, Hq, S, D)


def _reference_kernels(module: Any, qkv: QKV, config: InfLLMConfig) -> Prepared:
    """Prepare the CUDA kernels of the paper's authors, whose blocks are always of 64 keys."""
    if config.block_size != 64:
        raise NotImplementedError(f"expected blocks of 64, got {config.block_size}")
    leaves, S = _packed(qkv), qkv.key.shape[2]
    ends = _ends(S, qkv.key.device)
    function = module.infllmv2_attn_varlen_func

    def attend() -> Tensor:
        selected = select_blocks(qkv.query, qkv.key, config)
        return function(*leaves, ends, ends, S, S, causal=True, topk_idx=selected[0])

    return Prepared(attend, leaves, _unpacked)


def _flag_attention(module: Any, qkv: QKV, config: InfLLMConfig) -> Prepared:
    leaves, S = _packed(qkv), qkv.key.shape[2]
    ends = _ends(S, qkv.key.device)
    function = module.sparse_attention

    def attend() -> Tensor:
        selected = select_blocks(qkv.query, qkv.key, config)[0]
        return function(*leaves, selected, ends, ends, S, config.block_size, None, True)

    return Prepared(attend, leaves, _unpacked)


def _flashinfer(module: Any, qkv: QKV, config: InfLLMConfig) -> Prepared:
    """Prepare FlashInfer over pages: each token is a request whose pages are its blocks.

    Its wrapper for block-sparse matrices does the same, but cannot end a token's own block at the
    token without a mask of every element. All key/value heads are one row of pages.
    """
    query, key, value = (x.detach() for x in qkv)
    _one_row(qkv)
    (Hkv, S, D), size = key.shape[1:], config.block_size
    if S % size:
        raise NotImplementedError(f"expected a multiple of {size} tokens, got {S}")
    G, device = group_size(query.shape[1], key.shape[1]), key.device
    selected = select_blocks(query, key, config)[0]  # [Hkv, S, K]
    used = selected >= 0
    first = torch.arange(Hkv, device=device)[:, None, None] * (S // size)
    indices = (selected + first)[used].to(torch.int32)
    starts = torch.zeros(Hkv * S + 1, dtype=torch.int32, device=device)
    starts[1:] = used.sum(-1).flatten().cumsum(0)
    last = (torch.arange(S, dtype=torch.int32, device=device) % size + 1).repeat(Hkv)
    rows = torch.arange(Hkv * S + 1, dtype=torch.int32, device=device)
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(rows, starts, indices, last, G, 1, D, size, q_data_type=query.dtype)
    folded = _folded(query, Hkv).reshape(Hkv * S, G, D)
    pages = tuple(x[0].reshape(-1, size, 1, D).contiguous() for x in (key, value))

    def attend() -> Tensor:
        select_blocks(query, key, config)  # its result was planned with, once
        return wrapper.run(folded, pages)

    return Prepared(attend, qkv, lambda out: _unfolded(out, query, Hkv))


def _cudnn(module: Any, qkv: QKV, config: InfLLMConfig) -> Prepared:
    """Prepare cuDNN-frontend's block-sparse attention over unions.

    It has one list for 64 queries, no membership and no causal mask. With the heads of a group
    folded into the queries, a tile attends to the union of its tokens' blocks, and to all tokens of
    their own block: more than was asked for, so its time is what exact attention would need at
    least.
    """
    query, key, value = (x.detach() for x in qkv)
    _one_row(qkv)
    G, (Hkv, S, D), size = (
        group_size(query.shape[1], key.shape[1]),
        key.shape[1:],
        config.block_size,
    )
    if size != 64 or _ROWS % G or S % size:
        raise NotImplementedError(
            f"expected blocks of 64, a group that divides {_ROWS}, and a multiple of 64 tokens; "
            f"got {size}, {G}, {S}"
        )
    tokens = _ROWS // G
    folded = _folded(query, Hkv).reshape(1, Hkv, S * G, D)
    function = module.BSA.block_sparse_attention_forward

    def attend() -> Tensor:
        selected = select_blocks(query, key, config)
        num, idx, _ = union_lists.list_blocks(selected, S, size, tokens)
        out, _ = function(folded, key, value, idx, q2k_block_nums=num, sparse_block_size=size)
        return out

    seen = _union_mask(qkv, config, tokens)
    return Prepared(attend, qkv, lambda out: _unfolded(out, query, Hkv), seen)


def _union_mask(qkv: QKV, config: InfLLMConfig, tokens: int) -> Tensor:
    """Which keys the last queries see through the unions of their tiles: ``[1, Hkv, n, S]``."""
    S, size = qkv.key.shape[2], config.block_size
    selected = select_blocks(qkv.query, qkv.key, config)
    num, idx, _ = union_lists.list_blocks(selected, S, size, tokens)
    used = torch.arange(idx.shape[-1], device=idx.device) < num[..., None]
    blocks = torch.zeros(*idx.shape[:3], S // size + 1, dtype=torch.bool, device=idx.device)
    blocks.scatter_(-1, idx.masked_fill(~used, S // size).long(), True)
    n = min(CHECKED_QUERIES, S)
    tiles = torch.arange(S - n, S, device=idx.device) // tokens
    return blocks[:, :, tiles, :-1].repeat_interleave(size, -1)


RIVALS = (
    Rival("infllm_v2_given_{}_blocks", "infllm_v2", _reference_kernels, True),
    Rival("flag_attention_given_{}_blocks", "flag_attn.infllmv2.forward", _flag_attention, True),
    Rival("flashinfer_given_{}_blocks", "flashinfer", _flashinfer, False),
    Rival("cudnn_bsa_unions_of_{}_blocks", "cudnn", _cudnn, False),
)
