"""The checks of test_parallel.py, which each of several processes runs.

All checks of a size share one start. `run_checks` returns "passed" for every check, or the
traceback of any process.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from infllm_flex import attention
from infllm_flex.attention import infllm_attention
from infllm_flex.config import InfLLMConfig
from infllm_flex.training import loop
from infllm_flex.training.collectives import all_gather_text
from infllm_flex.training.loop import TrainingDivergedError, train
from infllm_flex.training.loss import LanguageLoss
from infllm_flex.training.parallel import World, open_world
from infllm_flex.training.parallel.context import ContextAttention, local_chunks
from infllm_flex.training.settings import (
    DataSettings,
    MemorySettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    SelectionLossSettings,
    TrainingSettings,
)
from tests.inputs import make_qkv
from tests.tolerance import assert_within_rounding
from tests.training.runs import ATTENTION, LONG, TINY, settings, stage

SPARSE = replace(LONG, attention="sparse", max_length=128, batch_size=4)
STAGES = {"short": stage(warmup_steps=1, batch_size=4), "long": SPARSE}
WITH_SELECTION_LOSS = replace(
    SPARSE, steps=6, selection_loss=SelectionLossSettings(weight=1000.0, queries=32)
)
IN_MICRO_BATCHES = {name: replace(some, sequences_at_once=1) for name, some in STAGES.items()}
# The runs by number of processes.
NAMES = {
    2: (
        *("fsdp", "ddp", "muon", "checkpointing", "offload", "context", "packed", "bfloat16"),
        *("selection_loss", "selection_loss_ddp"),
    ),
    4: ("fsdp", "context"),
}


def runs(folder: Path) -> dict[str, TrainingSettings]:
    """Every run by name."""
    texts = folder / "texts"

    def run(name: str, **changes: Any) -> TrainingSettings:
        return settings(folder / name, texts, **({"stages": STAGES} | changes))

    return {
        "fsdp": run("fsdp"),
        "ddp": run("ddp", parallel=ParallelSettings(kind="ddp"), stages=IN_MICRO_BATCHES),
        "muon": run("muon", optim=OptimSettings(kind="muon")),
        "checkpointing": run("checkpointing", memory=MemorySettings(activation_checkpointing=True)),
        "offload": run("offload", memory=MemorySettings(cpu_offload=True)),
        "context": run("context", parallel=ParallelSettings(context=2), stages=IN_MICRO_BATCHES),
        "packed": run(
            "packed",
            parallel=ParallelSettings(context=2),
            data=DataSettings(source=str(texts), packing="documents", held_out_percent=20),
        ),
        "bfloat16": run("bfloat16", model=ModelSettings(tiny=TINY, arithmetic="bfloat16")),
        "selection_loss": run("selection_loss", stages={"long": WITH_SELECTION_LOSS}),
        "selection_loss_ddp": run(
            "selection_loss_ddp",
            stages={"long": replace(WITH_SELECTION_LOSS, sequences_at_once=1)},
            parallel=ParallelSettings(kind="ddp"),
        ),
    }


def stopped_run(folder: Path) -> TrainingSettings:
    """A run that a signal to the last process stops after three steps."""
    run = runs(folder)["fsdp"]
    return replace(run, run=replace(run.run, folder=folder / "stopped"))


def attention_equals_that_of_one_process(world: World) -> None:
    for S, starts in ((128, None), (192, [0, 7, 70, 71, 180])):
        # The packed document of 109 tokens is sparse, and the others are dense.
        for dense_by in ("sequence", "position"):
            config = replace(ATTENTION, dense_len=100, dense_by=dense_by)
            _compare(world, config, S, starts)
    _compare(world, replace(ATTENTION, dense_len=129), 128, None)


def _compare(world: World, config: InfLLMConfig, S: int, starts: list[int] | None) -> None:
    batch = 2 if starts is None else 1
    whole = [x.requires_grad_() for x in make_qkv(B=batch, Hq=4, Hkv=2, S=S, D=8)]
    positions = None
    bounds = [0, S] if starts is None else [*starts, S]
    if starts is not None:
        lengths = [end - start for start, end in pairwise(bounds)]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]

    def alone(tensors: list[Tensor]) -> Tensor:
        documents = [
            infllm_attention(*(x[:, :, start:end] for x in tensors), config)
            for start, end in pairwise(bounds)
        ]
        return torch.cat(documents, dim=2)

    def local(x: Tensor) -> Tensor:
        return (
            local_chunks(x.transpose(1, 2).flatten(2), world).unflatten(2, (-1, 8)).transpose(1, 2)
        )

    expected_selections, selections = _Selections(), _Selections()
    weight = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1))
    with expected_selections as expected_calls:
        expected = alone(whole)
    expected.backward(weight)
    exact = [x.detach().double().requires_grad_() for x in whole]
    exact_out = alone(exact)
    exact_out.backward(weight.double())

    parts = [local(x.detach()).contiguous().requires_grad_() for x in whole]
    context_attention = ContextAttention(config, world)
    context_attention.set_documents(S, positions)
    with selections as calls:
        out = context_attention(*parts, None)
    out.backward(local(weight))
    assert_within_rounding(out, local(exact_out), local(expected))
    for x, y, z in zip(parts, exact, whole, strict=True):
        assert_within_rounding(x.grad, local(y.grad), local(z.grad), factor=3.0)
    if starts is None and calls and config.dense_by == "sequence":
        (full,) = expected_calls
        ours = torch.cat([_padded(part, full.shape[3]) for part in calls], dim=2)
        chunks = full.chunk(2 * world.context, dim=2)
        theirs = [chunks[world.context_rank], chunks[-1 - world.context_rank]]
        assert torch.equal(ours, torch.cat(theirs, dim=2))


def _padded(selected: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(selected, (0, width - selected.shape[3]), value=-1)


class _Selections:
    """Record the blocks that attention selects inside the with block."""

    def __enter__(self) -> list[Tensor]:
        self.calls: list[Tensor] = []
        real = attention.select_blocks_unchecked

        def select(*args: Any, **kwargs: Any) -> Tensor:
            self.calls.append(real(*args, **kwargs))
            return self.calls[-1]

        self._patch = mock.patch.object(attention, "select_blocks_unchecked", select)
        self._patch.start()
        return self.calls

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def a_signal_to_one_process_stops_all_after_the_same_step(folder: Path) -> None:
    real, last = loop.take_step, dist.get_rank() == dist.get_world_size() - 1

    def take_step(state: Any, *args: Any) -> Any:
        if last and state.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, *args)

    with mock.patch.object(loop, "take_step", take_step):
        outcome = train(stopped_run(folder), show=False)
    assert (outcome.step, outcome.signal, outcome.model) == (3, signal.SIGTERM, None)


def a_resumed_run_continues_in_the_same_bits(folder: Path) -> None:
    train(stopped_run(folder), resume=True, show=False)
    ours, straight = (folder / name / "metrics.jsonl" for name in ("stopped", "fsdp"))
    assert losses(ours) == losses(straight)
    ours, straight = (folder / name / "model" for name in ("stopped", "fsdp"))
    name = "model.safetensors"
    assert (ours / name).read_bytes() == (straight / name).read_bytes()


def a_nan_in_one_process_stops_all(folder: Path) -> None:
    run = runs(folder)["fsdp"]
    run = replace(run, run=replace(run.run, folder=folder / "nan"))
    real, rank = LanguageLoss._chunk_loss, dist.get_rank()

    def cost(*args: Any) -> Tensor:
        return real(*args) * (float("nan") if rank else 1.0)

    said = r"step 1: the loss is nan; its batch is samples 0 to 3 of stage short"
    with (
        mock.patch.object(LanguageLoss, "_chunk_loss", cost),
        pytest.raises(TrainingDivergedError, match=said),
    ):
        train(run, show=False)


def losses(path: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step in ``metrics.jsonl``."""
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["loss"], line["gradient_norm"]) for line in lines]


def checks_of(folder: Path, size: int) -> dict[str, Callable[[], object]]:
    """The checks for a number of processes, by name, in order."""
    shared = replace(runs(folder)["fsdp"], parallel=ParallelSettings(context=size))

    def compare_attention() -> None:
        with open_world(shared) as world:
            attention_equals_that_of_one_process(world)

    checks: dict[str, Callable[[], object]] = {"attention": compare_attention}
    for name in NAMES[size]:
        checks[name] = functools.partial(train, runs(folder)[name], show=False)
    if size == 2:
        checks["stopped"] = lambda: a_signal_to_one_process_stops_all_after_the_same_step(folder)
        checks["resumed"] = lambda: a_resumed_run_continues_in_the_same_bits(folder)
        checks["nan"] = lambda: a_nan_in_one_process_stops_all(folder)
    return checks


def run_checks(folder: Path) -> dict[str, str]:
    """Run the checks in every process of the group; returns the results by name."""
    warnings.simplefilter("error")
    # PyTorch's warnings about its own modules.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    results = {}
    for name, check in checks_of(folder, dist.get_world_size()).items():
        try:
            check()
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        results[name] = "".join(all_gather_text(failure)) or "passed"
    return results
