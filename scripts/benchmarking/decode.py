"""Subjects of a decode step: one new token over a cache, sparse and dense."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from benchmarking.timing import Subject, in_turn
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

    On a GPU every subject is captured in a CUDA graph, as in serving. Where the case has several
    layers, the graph holds a step for each, over tensors of its own.

    Args:
        settings: The run.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens in the cache before the step. Where it is a multiple of the windows' strides, the
            step completes no window, like most steps.
        case: Kind of queries, and on a GPU the dense attentions to compare with.

    Returns:
        The subjects, and the dense attentions that are not available here, with the reason.
    """
    layers = _layers(make_qkv(settings, heads, S + 1, case.inputs, num_queries=1), case.layers)
    is_cuda = layers[0].key.is_cuda

    def prepare(runs: Sequence[Callable[[], Tensor]]) -> Callable[[], Any]:
        return _capture(in_turn(runs)) if is_cuda else in_turn(runs)

    subjects: list[Subject] = []
    unavailable: dict[str, str] = {}
    for name, config in settings.attentions.items():
        steps = [_Step(qkv, config) for qkv in layers]
        select = prepare([step.select for step in steps])
        everything = prepare([step.everything for step in steps])
        subjects += [
            Subject("select_blocks", "", select, settings=name),
            Subject("infllm_attention", VARIANT, everything, settings=name),
        ]
        if case.page_size:
            paged = [PagedAttention(qkv, config, case.page_size) for qkv in layers]
            run = prepare([one.run for one in paged])
            subjects.append(Subject("infllm_attention", DECODE_PAGED, run, settings=name))
            pages = [one.pages for one in paged]
    if case.page_size:
        dense_subjects, unavailable = paged_dense_subjects(
            layers, pages, case.baselines, prepare, has_packages=is_cuda
        )
        subjects += dense_subjects
    for name, backend in _BACKENDS[layers[0].key.device.type].items():
        if is_cuda and case.baselines and name not in case.baselines:
            continue
        try:
            with warnings.catch_warnings():  # a backend warns before it raises
                warnings.simplefilter("ignore")
                dense = prepare([functools.partial(_dense, qkv, backend) for qkv in layers])
            subjects.append(Subject("dense", name, dense))
        except RuntimeError as error:
            unavailable[name] = f"not supported: {str(error).splitlines()[0]}"
    return [replace(subject, repeats=case.layers) for subject in subjects], unavailable


def _layers(qkv: QKV, count: int) -> list[QKV]:
    """Return the tensors, and copies of them for further layers."""
    return [qkv, *(QKV(*(x.clone() for x in qkv)) for _ in range(count - 1))]


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
