"""Correctness checks that run before any timing."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarking.checkout import ROOT
from benchmarking.inputs import QKV, make_qkv, with_gradients
from benchmarking.paged import PagedAttention
from benchmarking.settings import BenchmarkSettings, Heads
from infllm_flex import reference
from infllm_flex.attention import infllm_attention
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import CompressedKeys, decode_attention, select_cached
from infllm_flex.selection import select_blocks
from infllm_flex.validation import resolve_scale
from infllm_flex_ops.sizes import group_size

CHECKED_QUERIES = 40  # the last queries of the sequence; the reference is too slow for all of them
# Two scores may rank either way within this relative difference, because kernels sum in another
# order and read rounded means. Sums of exponentials: relative to the score. Dot products of pooled
# queries: relative to the largest score of the row.
_TIE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_POOLED_TIE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_FLOAT8_TIE = 3e-2  # a mean near the midpoint of two float8 numbers may round to either
_FLOAT8_WINDOW_TIE = 8e-2  # means of windows are rounded twice: to the keys' dtype, then to float8


class IncorrectError(RuntimeError):
    """An operator is wrong on this device; the message names it and the error."""


def run_tests(arguments: Sequence[str]) -> None:
    """Run pytest in a process of its own.

    Args:
        arguments: Arguments of pytest; paths are relative to the root of the repository.

    Raises:
        IncorrectError: A test fails, none ran, or pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise IncorrectError("run.tests asks for pytest, which is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        said = "\n".join((ended.stdout + ended.stderr).splitlines()[-12:])
        raise IncorrectError(f"{' '.join(arguments)} ended with {ended.returncode}:\n{said}")


def check_operators(settings: BenchmarkSettings, heads: Heads) -> None:
    """Compare what the run times with the float64 reference at a small length.

    That is selection, and the output, gradients or decode step of the run's modes. Kernels that are
    not timed need not be compiled. Device, dtype, heads and attention settings are the run's.

    Args:
        settings: The run; its ``variants`` are not checked.
        heads: ``Hq`` and ``Hkv``.

    Raises:
        IncorrectError: They differ by more than rounding.
    """
    config = settings.attention
    S = max((config.num_selected + 16) * config.block_size, config.dense_len)
    qkv = make_qkv(settings, heads, S, "independent")
    selected = select_blocks(qkv.query, qkv.key, config)
    _check_selection("select_blocks", qkv, selected, config)
    modes = settings.timed_modes
    for engine in settings.engines if modes - {"decode"} else ():
        of_engine = dataclasses.replace(config, engine=engine)
        _check_attention(qkv, selected, of_engine, "forward+backward" in modes)
    if "decode" in modes:
        _check_decode_step(qkv, config)
    for page_size in {case.page_size for case in settings.cases.values() if case.page_size}:
        _check_paged(qkv, selected, config, page_size)


def _check_selection(op: str, qkv: QKV, selected: Tensor, config: InfLLMConfig) -> None:
    """Check that forced blocks are selected and that other blocks score high enough.

    A block that the reference does not select must score at least as high, within a tie, as every
    block that it selects instead. Only the last queries of ``selected [B, Hkv, n, K]``, the last of
    the sequence, are checked.
    """
    num_queries = min(CHECKED_QUERIES, selected.shape[2])
    query, key = qkv.query[:1, :, -num_queries:].cpu(), qkv.key[:1].cpu()
    ours, S = selected[0, :, -num_queries:].cpu(), key.shape[2]
    G, scale = group_size(query.shape[1], key.shape[1]), resolve_scale(query, None)
    expected = reference.select_blocks(query, key, config, scale=scale)[0]
    for h in range(key.shape[1]):
        group = query[0, h * G : (h + 1) * G]
        scores = reference.score_blocks(group, key[0, h], config, scale=scale)
        for s, token in enumerate(range(S - num_queries, S)):
            theirs, chosen = set(expected[h, s].tolist()), ours[h, s].tolist()
            if len(chosen) != len(expected[h, s]) or chosen != sorted(set(chosen)):
                raise IncorrectError(
                    f"{op}: expected {len(expected[h, s])} ascending blocks, got {chosen}"
                )
            wrong, missed = set(chosen) - theirs, theirs - set(chosen)
            if not wrong:
                continue
            best, least = (scores[s, sorted(x)] for x in (missed, wrong))
            own = token // config.block_size
            lacks_forced = any(reference.is_forced(block, own, config) for block in missed)
            highest = least.min() + _tie(scores[s], least.min(), config, query.dtype)
            if lacks_forced or bool(best.max() > highest):
                raise IncorrectError(
                    f"{op}: token {token} of head {h} selects blocks {sorted(wrong)} instead of "
                    f"{sorted(missed)}"
                )


def _tie(scores: Tensor, score: Tensor, config: InfLLMConfig, dtype: torch.dtype) -> Tensor:
    """How far another of the row's ``scores`` may exceed ``score`` and still rank below it."""
    if not config.pool_queries:
        return score * _TIE[dtype]
    largest = scores[scores.isfinite()].abs().max()
    if config.score_dtype == "same":
        return largest * _POOLED_TIE[dtype]
    return largest * (_FLOAT8_TIE if config.kernel_size == 1 else _FLOAT8_WINDOW_TIE)


def _check_decode_step(qkv: QKV, config: InfLLMConfig) -> None:
    """Check selection and output of a decode step whose token is the last of the sequence."""
    query, key, value = qkv
    step, S, scale = query[:, :, -1:], key.shape[2], resolve_scale(query, None)
    keys = CompressedKeys(config, key)
    keys.append(key, S)
    selected = select_cached(step, keys, capacity=S, key=key)
    if bool((selected[..., config.num_selected :] >= 0).any()):
        raise IncorrectError(f"select_cached: more than {config.num_selected} blocks are selected")
    _check_selection("select_cached", qkv, selected[..., : config.num_selected], config)
    mask = reference.attention_mask(selected, config.block_size, S).to(query.device)
    actual = decode_attention(step, key, value, keys)
    exact = reference.masked_attention(step, key, value, mask, scale=scale)
    check_error(
        "infllm_attention (decoding)", actual, exact, plain_attention(step, key, value, mask)
    )


def _check_paged(qkv: QKV, selected: Tensor, config: InfLLMConfig, page_size: int) -> None:
    """Check attention over pages for the last query, and for the last ones as a chunk."""
    config = dataclasses.replace(config, dense_len=-1)
    scale = resolve_scale(qkv.query, None)
    for name, n in (("decoding", 1), ("a chunk", CHECKED_QUERIES)):
        query, key, value = qkv.query[:, :, -n:], qkv.key, qkv.value
        out = PagedAttention(QKV(query, key, value), config, page_size).run()
        actual = out.unflatten(0, (len(key), n)).transpose(1, 2)
        mask = reference.attention_mask(selected[:, :, -n:], config.block_size, key.shape[2])
        mask = mask.to(query.device)
        exact = reference.masked_attention(query, key, value, mask, scale=scale)
        plain = plain_attention(query, key, value, mask)
        check_error(f"paged_attention ({name})", actual, exact, plain)


def _check_attention(qkv: QKV, selected: Tensor, config: InfLLMConfig, has_gradients: bool) -> None:
    scale, block_size = resolve_scale(qkv.query, None), config.block_size
    mask = reference.attention_mask(selected[:, :, -CHECKED_QUERIES:], block_size, qkv.key.shape[2])
    mask = mask.to(qkv.query.device)
    grad_out = torch.zeros_like(qkv.query)
    grad_out[:, :, -CHECKED_QUERIES:] = torch.randn_like(grad_out[:, :, -CHECKED_QUERIES:])

    with torch.no_grad():
        inference = infllm_attention(*qkv, config, selected=selected)[:, :, -CHECKED_QUERIES:]
    exact = _run(
        QKV(*(x.double() for x in qkv)),
        lambda q, k, v: reference.masked_attention(
            q[:, :, -CHECKED_QUERIES:], k, v, mask, scale=scale
        ),
        grad_out[:, :, -CHECKED_QUERIES:].double(),
    )
    plain = _run(
        qkv,
        lambda q, k, v: plain_attention(q[:, :, -CHECKED_QUERIES:], k, v, mask),
        grad_out[:, :, -CHECKED_QUERIES:],
    )
    what = f"infllm_attention ({config.engine}, output without gradients)"
    check_error(what, inference, exact[0], plain[0])
    if not has_gradients:
        return
    ours = _run(qkv, lambda q, k, v: infllm_attention(q, k, v, config, selected=selected), grad_out)
    for name, actual, true, same in zip(
        ("output", "dq", "dk", "dv"), ours, exact, plain, strict=True
    ):
        what = f"infllm_attention ({config.engine}, {name})"
        check_error(what, actual[:, :, -len(true[0, 0]) :], true, same)


def _run(
    qkv: QKV, attend: Callable[[Tensor, Tensor, Tensor], Tensor], grad_out: Tensor
) -> list[Tensor]:
    """Return the output of the last queries, and the gradients."""
    leaves = with_gradients(qkv)
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad_out)
    return [out.detach()[:, :, -CHECKED_QUERIES:], *gradients]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked attention by plain operations in the run's precision; its error sets the limit."""
    G = group_size(q.shape[1], k.shape[1])
    k, v, mask = (x.repeat_interleave(G, dim=1) for x in (k, v, mask))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def check_error(what: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Check that an error is at most three times that of plain operations, plus rounding.

    Raises:
        IncorrectError: It is larger.
    """
    error, allowed = ((x.double() - exact).abs().max().item() for x in (actual, plain))
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    limit = 3 * (allowed + rounding)
    if not error <= limit:
        raise IncorrectError(f"{what}: error {error:.3g}, allowed {limit:.3g}")
