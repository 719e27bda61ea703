"""Subjects of a decode step: one new token over a cache, sparse and dense."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarking.inputs import QKV, make_qkv
from benchmarking.paged import PagedAttention
from benchmarking.paged_dense import paged_dense_subjects
from benchmarking.report import DECODE_PAGED
from benchmarking.settings import BenchmarkSettings, CaseSettings, Heads
from benchmarking.timing import Subject
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import CompressedKeys, decode_attention, select_cached

VARIANT = "decode"
_BACKENDS: dict[str, dict[str, SDPBackend | None]] = {
    "cpu": {"sdpa": None},
    "cuda": {
        "sdpa": None,  # the backend that PyTorch chooses
        "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    },
}


def decode_subjects(
    settings: BenchmarkSettings, heads: Heads, S: int, case: CaseSettings
) -> tuple[list[Subject], dict[str, str]]:
    """Prepare a step over ``S`` cached tokens: selection alone, the whole step, dense attention.

    Where the case has pages, the whole step and dense attention over pages, too.

    On a GPU every subject is captured in a CUDA graph, as in serving.

    Args:
        settings: The run.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens in the cache before the step. Where it is a multiple of the windows' strides, the
            step completes no window, like most steps.
        case: Kind of queries, and on a GPU the dense attentions to compare with.

    Returns:
        The subjects, and the dense attentions that are not available here, with the reason.
    """
    qkv = make_qkv(settings, heads, S + 1, case.inputs, num_queries=1)
    prepare = _capture if qkv.key.is_cuda else _not_captured
    subjects: list[Subject] = []
    unavailable: dict[str, str] = {}
    for name, config in settings.attentions.items():
        step = _Step(qkv, config)
        subjects += [
            Subject("select_blocks", "", prepare(step.select), settings=name),
            Subject("infllm_attention", VARIANT, prepare(step.everything), settings=name),
        ]
        if case.page_size:
            paged = PagedAttention(qkv, config, case.page_size)
            run = prepare(paged.run)
            subjects.append(Subject("infllm_attention", DECODE_PAGED, run, settings=name))
            pages = paged.pages
    if case.page_size:
        dense_subjects, unavailable = paged_dense_subjects(
            qkv, pages, case.baselines, prepare, has_packages=qkv.key.is_cuda
        )
        subjects += dense_subjects
    for name, backend in _BACKENDS[qkv.key.device.type].items():
        if qkv.key.is_cuda and case.baselines and name not in case.baselines:
            continue
        try:
            with warnings.catch_warnings():  # a backend warns before it raises
                warnings.simplefilter("ignore")
                dense = prepare(functools.partial(_dense, qkv, backend))
            subjects.append(Subject("dense", name, dense))
        except RuntimeError as error:
            unavailable[name] = f"not supported: {str(error).splitlines()[0]}"
    return subjects, unavailable


class _Step:
    """A decode step: one token after a full cache."""

    def __init__(self, qkv: QKV, config: InfLLMConfig) -> None:
        self._qkv = qkv
        self._keys = CompressedKeys(config, qkv.key)
        self._keys.append(qkv.key, qkv.key.shape[2])
        self._end = self._keys.end.clone()

    def everything(self) -> Tensor:
        """Append the token, select and attend. Every run appends at the same position."""
        self._keys.append(self._qkv.key, 1, end=self._end)
        return decode_attention(*self._qkv, self._keys)

    def select(self) -> Tensor:
        """Select only."""
        query, key, _ = self._qkv
        return select_cached(query, self._keys, capacity=key.shape[2], key=key)


@torch.no_grad()
def _dense(qkv: QKV, backend: SDPBackend | None) -> Tensor:
    """Attend to the whole cache."""
    is_grouped = qkv.query.shape[1] != qkv.key.shape[1]
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv, enable_gqa=is_grouped)


def _not_captured(run: Callable[[], Tensor]) -> Callable[[], Any]:
    return run


@dataclass(frozen=True)
class _Replay:
    """A CUDA graph, and what was captured: the graph alone does not keep its tensors alive."""

    graph: torch.cuda.CUDAGraph
    run: Callable[[], Tensor]

    def __call__(self) -> None:
        """Run the graph."""
        self.graph.replay()


def _capture(run: Callable[[], Tensor]) -> Callable[[], Any]:
    """Capture in a CUDA graph, after warm-up runs that compile the kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return _Replay(graph, run)
