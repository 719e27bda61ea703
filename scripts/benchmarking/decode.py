"""What a decode step compares: one new token over a cache, sparse and dense."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarking.inputs import QKV, make_qkv
from benchmarking.settings import BenchmarkSettings, CaseSettings, Heads
from benchmarking.timing import Subject
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import CompressedKeys, decode_attention, select_cached

VARIANT = "decode"
_BACKENDS: dict[str, dict[str, SDPBackend | None]] = {
    "cpu": {"sdpa": None},
    "cuda": {
        "sdpa": None,  # whichever PyTorch chooses
        "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    },
}


def decode_subjects(
    settings: BenchmarkSettings, heads: Heads, S: int, case: CaseSettings
) -> tuple[list[Subject], dict[str, str]]:
    """Prepare a step over ``S`` cached tokens: its stages, all of it, and dense attention.

    On a GPU every one is captured in a CUDA graph, as serving runs it.

    Args:
        settings: The run.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens in the cache before the step. Most steps complete no window; with S a multiple of
            the windows' steps, this is such a one.
        case: Kind of queries, and on a GPU which dense attentions to compare with.

    Returns:
        The subjects, and which dense attentions do not serve here and why.
    """
    qkv = make_qkv(settings, heads, S + 1, case.inputs, num_queries=1)
    prepare = _captured if qkv.key.is_cuda else _as_it_is
    subjects = []
    for name, config in settings.attentions.items():
        step = _Step(qkv, config)
        subjects += [
            Subject("select_blocks", "", prepare(step.select), settings=name),
            Subject("infllm_attention", VARIANT, prepare(step.everything), settings=name),
        ]
    failing = {}
    for name, backend in _BACKENDS[qkv.key.device.type].items():
        if qkv.key.is_cuda and case.baselines and name not in case.baselines:
            continue
        try:
            with warnings.catch_warnings():  # SDPA explains at length why it declines
                warnings.simplefilter("ignore")
                dense = prepare(functools.partial(_dense, qkv, backend))
            subjects.append(Subject("dense", name, dense))
        except RuntimeError as error:
            failing[name] = str(error).splitlines()[0]
    return subjects, failing


class _Step:
    """One token after a cache."""

    def __init__(self, qkv: QKV, config: InfLLMConfig) -> None:
        self._qkv = qkv
        self._keys = CompressedKeys(config, qkv.key)
        self._keys.append(qkv.key, qkv.key.shape[2])
        self._end = self._keys.end.clone()

    def everything(self) -> Tensor:
        """Take the token in, select and attend; the next run takes it in again."""
        self._keys.append(self._qkv.key, 1, end=self._end)
        return decode_attention(*self._qkv, self._keys)

    def select(self) -> Tensor:
        """Select alone."""
        query, key, _ = self._qkv
        return select_cached(query, self._keys, capacity=key.shape[2], key=key)


@torch.no_grad()
def _dense(qkv: QKV, backend: SDPBackend | None) -> Tensor:
    """Attend to all of the cache."""
    is_grouped = qkv.query.shape[1] != qkv.key.shape[1]
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv, enable_gqa=is_grouped)


def _as_it_is(run: Callable[[], Tensor]) -> Callable[[], Any]:
    return run


def _captured(run: Callable[[], Tensor]) -> Callable[[], Any]:
    """Capture in a CUDA graph, after runs that compile what has to be compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
