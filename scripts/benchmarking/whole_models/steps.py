"""The measurements of a run in order, and one of them carried out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarking.results import CsvFile
from benchmarking.whole_models.clock import Deadline, time_by_turns
from benchmarking.whole_models.pairs import Pair
from benchmarking.whole_models.profile import profile
from benchmarking.whole_models.rows import MEASURED
from benchmarking.whole_models.runs import decoded_tokens, prepared
from benchmarking.whole_models.settings import (
    Activations,
    ModelBenchmark,
    ModelCase,
    ModelShape,
    RunSettings,
)


class Step(NamedTuple):
    """One measurement.

    Attributes:
        case: Phase, batch and so on.
        model: Name of the model.
        shape: Its shape.
        layers: Layers to build.
        activations: Kind of weights and inputs.
        length: Tokens.
    """

    case: ModelCase
    model: str
    shape: ModelShape
    layers: int
    activations: Activations
    length: int

    @property
    def pair(self) -> tuple[str, int, Activations]:
        """The settings that the models of the step depend on."""
        return self.model, self.layers, self.activations

    def cells(self, run: RunSettings) -> dict[str, Any]:
        """Return the cells of the CSV that describe the step."""
        return {
            "phase": self.case.phase,
            "model": self.model,
            "activations": self.activations,
            "layers": self.layers,
            "B": self.case.batch,
            "S": self.length,
            "dtype": run.dtype,
            "dense_backend": self.case.dense,
        }

    def __str__(self) -> str:
        return (
            f"{self.case.phase}, {self.model}, {self.layers} layers, {self.activations} "
            f"activations, batch {self.case.batch}, {self.length} tokens"
        )


def steps_of(settings: ModelBenchmark) -> Iterator[Step]:
    """Yield the measurements by model, so that few models are built; cases keep their order."""
    for model, shape in settings.models.items():
        of_model = [
            Step(case, model, shape, _layers(case, shape, activations), activations, length)
            for case in settings.cases.values()
            if not case.models or model in case.models
            for activations in case.activations
            for length in case.lengths
        ]
        pairs = dict.fromkeys(step.pair for step in of_model)
        for pair in pairs:
            yield from (step for step in of_model if step.pair == pair)


def _layers(case: ModelCase, shape: ModelShape, activations: Activations) -> int:
    """Count the layers of the models; trained ones are whole."""
    return shape.num_layers if activations == "trained" else case.layers or shape.num_layers


def longest_by_model(settings: ModelBenchmark) -> dict[str, int]:
    """Return for each model the positions that its longest sequence needs, new tokens included."""
    longest: dict[str, int] = {}
    for step in steps_of(settings):
        longest[step.model] = max(longest.get(step.model, 0), step.length)
    return {model: length + decoded_tokens(settings.run) for model, length in longest.items()}


def time_step(run: RunSettings, step: Step, pair: Pair, out: CsvFile, deadline: Deadline) -> None:
    """Time both models of a step, profile them where the case asks for it, and write two rows.

    Raises:
        OutOfTimeError: The deadline came first; nothing was written.
        RuntimeError: A model cannot run, for want of memory or for another reason.
    """
    device = torch.device(run.device)
    with prepared(run, step.case, pair, step.length) as timed:
        timings = time_by_turns(timed, device, run.warmup, run.rounds, deadline)
        rows = []
        for one, (p20, p50, p80) in zip(timed, timings, strict=True):
            row: dict[str, Any] = {"attention": one.attention, "result": MEASURED}
            row |= {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80}
            if device.type == "cuda" or step.case.profile:
                row |= _one_more_run(one.run, one.steps, step, device, deadline)
            rows.append(row)
    for row in rows:
        out.add(**step.cells(run), **row)


def _one_more_run(
    run: Any, steps: int, step: Step, device: torch.device, deadline: Deadline
) -> dict[str, float]:
    """Run once more for the peak of memory, and for the groups of kernels where asked for."""
    deadline.check()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    cells: dict[str, float] = {}
    if step.case.profile:
        cells = {f"ms_{group}": ms / steps for group, ms in profile(run, device).items()}
    else:
        run()
    if device.type == "cuda":
        cells["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return cells


def free_memory() -> None:
    """Give back what models and caches held."""
    torch.compiler.reset()  # compiled graphs hold their models and CUDA graphs
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
