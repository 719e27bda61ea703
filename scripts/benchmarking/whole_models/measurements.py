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
from benchmarking.whole_models.runs import Timed, decoded_tokens, prepared
from benchmarking.whole_models.settings import (
    Activations,
    ModelBenchmark,
    ModelCase,
    ModelShape,
    RunSettings,
)


class Measurement(NamedTuple):
    """The subject of one measurement.

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
        """The settings that its models depend on."""
        return self.model, self.layers, self.activations

    def cells(self, run: RunSettings) -> dict[str, Any]:
        """Return the cells of the CSV that describe it."""
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


def measurements_of(settings: ModelBenchmark) -> Iterator[Measurement]:
    """Yield the measurements by model, so that few models are built; cases keep their order."""
    for model, shape in settings.models.items():
        of_model = [
            Measurement(case, model, shape, _layers(case, shape, activations), activations, length)
            for case in settings.cases.values()
            if not case.models or model in case.models
            for activations in case.activations
            for length in case.lengths
        ]
        pairs = dict.fromkeys(one.pair for one in of_model)
        for pair in pairs:
            yield from (one for one in of_model if one.pair == pair)


def _layers(case: ModelCase, shape: ModelShape, activations: Activations) -> int:
    """Count the layers of the models; trained ones are whole."""
    return shape.num_layers if activations == "trained" else case.layers or shape.num_layers


def longest_by_model(settings: ModelBenchmark) -> dict[str, int]:
    """Return for each model the positions that its longest sequence needs, new tokens included."""
    longest: dict[str, int] = {}
    for one in measurements_of(settings):
        longest[one.model] = max(longest.get(one.model, 0), one.length)
    return {model: length + decoded_tokens(settings.run) for model, length in longest.items()}


def time_pair(
    run: RunSettings, measurement: Measurement, pair: Pair, out: CsvFile, deadline: Deadline
) -> None:
    """Time both models, profile them where the case asks for it, and write two rows.

    Raises:
        OutOfTimeError: The deadline came first; nothing was written.
        RuntimeError: A model cannot run, for want of memory or for another reason.
    """
    device, case = torch.device(run.device), measurement.case
    with prepared(run, case, pair, measurement.length) as timed:
        timings = time_by_turns(timed, device, run.warmup, run.rounds, deadline)
        rows = []
        for one, (p20, p50, p80) in zip(timed, timings, strict=True):
            row: dict[str, Any] = {"attention": one.attention, "result": MEASURED}
            row |= {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80}
            if device.type == "cuda" or case.profile:
                row |= _one_more_run(one, case, device, deadline)
            rows.append(row)
    for row in rows:
        out.add(**measurement.cells(run), **row)


def _one_more_run(
    timed: Timed, case: ModelCase, device: torch.device, deadline: Deadline
) -> dict[str, float]:
    """Run once more for the peak of memory, and for the groups of kernels where asked for."""
    deadline.check()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    cells: dict[str, float] = {}
    if case.profile:
        times = profile(timed.run, device)
        cells = {f"ms_{group}": ms / timed.steps for group, ms in times.items()}
    else:
        timed.run()
    if device.type == "cuda":
        cells["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return cells


def free_memory() -> None:
    """Give back what models and caches held."""
    torch.compiler.reset()  # compiled graphs hold their models and CUDA graphs
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
