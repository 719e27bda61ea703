"""The subjects of a case: each stage of sparse attention, all stages together, and baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import infllm_flex_ops
from benchmarking.decode import decode_subjects
from benchmarking.dense import Baseline, dense_attentions
from benchmarking.inputs import QKV, make_qkv, with_gradients
from benchmarking.nsa import nsa_attentions
from benchmarking.paged import PagedAttention
from benchmarking.paged_dense import paged_dense_subjects
from benchmarking.report import PAGED
from benchmarking.rivals import rival_attentions
from benchmarking.settings import BenchmarkSettings, CaseSettings, Heads
from benchmarking.stages import engine_steps
from benchmarking.timing import Subject
from infllm_flex.attention import infllm_attention
from infllm_flex.config import InfLLMConfig
from infllm_flex.selection import select_blocks
from infllm_flex.validation import resolve_scale
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.block_lists.membership import MAX_TILE_TOKENS
from infllm_flex_ops.sizes import group_size


def make_subjects(
    settings: BenchmarkSettings, heads: Heads, S: int, case: CaseSettings
) -> tuple[list[Subject], dict[str, str]]:
    """Prepare all subjects at one shape.

    Args:
        settings: The run.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens.
        case: Mode, kind of queries and baselines.

    Returns:
        The subjects, and the baselines that are not available here, with the reason.
    """
    if case.mode == "decode":
        return decode_subjects(settings, heads, S, case)
    qkv = make_qkv(settings, heads, S, case.inputs)
    grad_out = None
    if case.mode == "forward+backward":
        grad_out = torch.randn_like(qkv.query)
        qkv = with_gradients(qkv)
    subjects = []
    for name, config in settings.attentions.items():
        stages = _stages(qkv, config, settings.engines, grad_out)
        subjects += [dataclasses.replace(stage, settings=name) for stage in stages]
        if case.page_size:
            paged = PagedAttention(qkv, config, case.page_size)
            subjects.append(Subject("infllm_attention", PAGED, paged.run, settings=name))
            pages = paged.pages
    if case.tile_rows:
        subjects += _tilings(qkv, settings.attention, case.tile_rows, grad_out)
    attentions, unavailable = dense_attentions(qkv, case.baselines)
    subjects += [
        Subject(
            "dense", name, _with_gradients(dense.attend, grad_out), _backward(dense.qkv, grad_out)
        )
        for name, dense in attentions.items()
    ]
    if case.page_size:
        over_pages, without_pages = paged_dense_subjects(
            [qkv], [pages], case.baselines, has_packages=qkv.key.is_cuda
        )
        subjects += over_pages
        unavailable |= without_pages
    if qkv.query.is_cuda:
        attentions, without_nsa = nsa_attentions(qkv, settings.attention, case.baselines)
        subjects += _nsa(attentions, grad_out)
        rivals, without_rivals = rival_attentions(qkv, settings.attention, case.baselines)
        subjects += _rivals(rivals, grad_out is not None)
        unavailable |= without_nsa | without_rivals
    return subjects, unavailable


def _stages(
    qkv: QKV, config: InfLLMConfig, engines: Iterable[str], grad_out: Tensor | None
) -> list[Subject]:
    """Return block selection, and the later stages by each engine."""
    selected = select_blocks(qkv.query, qkv.key, config)
    subjects = [Subject("select_blocks", "", lambda: select_blocks(qkv.query, qkv.key, config))]
    for engine in engines:
        subjects += _sparse(qkv, selected, dataclasses.replace(config, engine=engine), grad_out)
    return subjects


def _sparse(
    qkv: QKV, selected: Tensor, config: InfLLMConfig, grad_out: Tensor | None
) -> list[Subject]:
    """Return list building, attention over lists, and all stages together, by one engine."""
    everything = _with_gradients(lambda: infllm_attention(*qkv, config), grad_out)
    steps = engine_steps(qkv, selected, config)
    backward = _backward(qkv, grad_out)
    return [
        Subject("build_lists", config.engine, steps.build_lists),
        Subject("attend", config.engine, _with_gradients(steps.attend, grad_out), backward),
        Subject("infllm_attention", config.engine, everything, backward),
    ]


def _nsa(attentions: dict[str, Baseline], grad_out: Tensor | None) -> list[Subject]:
    """Return the subjects of other sparse attentions, whose layout is ``[B, S, H, D]``."""
    by_token = None if grad_out is None else grad_out.transpose(1, 2).contiguous()
    return [
        Subject("nsa", name, _with_gradients(nsa.attend, by_token), _backward(nsa.qkv, by_token))
        for name, nsa in attentions.items()
    ]


def _rivals(attentions: dict[str, Baseline], has_backward: bool) -> list[Subject]:
    """Return the subjects of other packages, each with gradients of its own layout."""
    subjects = []
    for name, rival in attentions.items():
        grad_out = torch.randn_like(rival.attend()) if has_backward else None
        forward = _with_gradients(rival.attend, grad_out)
        subjects.append(Subject("rival", name, forward, _backward(rival.qkv, grad_out)))
    return subjects


def _tilings(
    qkv: QKV, config: InfLLMConfig, tile_rows: tuple[int, ...], grad_out: Tensor | None
) -> list[Subject]:
    """Return the operator with tiles of given sizes instead of its heuristic's."""
    selected = select_blocks(qkv.query, qkv.key, config)
    groups = group_size(qkv.query.shape[1], qkv.key.shape[1])
    own = (selected >= 0).sum(-1).float().mean()
    subjects = []
    for rows in tile_rows:
        tokens = rows // groups
        if not 1 <= tokens <= MAX_TILE_TOKENS:
            continue
        num, _, _ = union_lists.list_blocks(selected, qkv.key.shape[2], config.block_size, tokens)
        inflation = (num.float().mean() / own).item()

        def attend(tokens: int = tokens) -> Tensor:
            scale = resolve_scale(qkv.query, None)
            out, _ = infllm_flex_ops.attend_blocks(*qkv, selected, config.block_size, scale, tokens)
            return out

        variant = f"{rows} rows, u = {inflation:.2f}"
        forward, backward = _with_gradients(attend, grad_out), _backward(qkv, grad_out)
        subjects.append(Subject("attend_blocks", variant, forward, backward))
    return subjects


def _with_gradients(forward: Callable[[], Tensor], grad_out: Tensor | None) -> Callable[[], Tensor]:
    """Enable gradients in ``forward`` only where a backward follows."""

    def run() -> Tensor:
        with torch.set_grad_enabled(grad_out is not None):
            return forward()

    return run


def _backward(qkv: QKV, grad_out: Tensor | None) -> Callable[[Tensor], object] | None:
    if grad_out is None:
        return None
    return lambda out: torch.autograd.grad(out, qkv, grad_out)
