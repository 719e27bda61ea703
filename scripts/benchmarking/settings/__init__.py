"""Settings of a benchmark: one frozen dataclass per section of its YAML file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from benchmarking.settings.cases import (
    CaseMode,
    CaseSettings,
    Inputs,
    MemorySettings,
    ModelSettings,
)
from benchmarking.settings.run import FloorSettings, RunSettings
from benchmarking.settings.shapes import Heads, ShapeSettings
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import window_entries

__all__ = [
    "BenchmarkSettings",
    "CaseSettings",
    "FloorSettings",
    "Heads",
    "Inputs",
    "MemorySettings",
    "ModelSettings",
    "RunSettings",
    "ShapeSettings",
]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """All settings of ``scripts/benchmark.py``, read from one YAML file.

    Attributes:
        run: Where and how to measure.
        shapes: Shapes that all cases share.
        cases: Series of timings by name.
        attention: The sparse attention that is measured.
        variants: Other attention settings by name, measured beside ``attention`` in every case.
        engines: Engines to measure; each replaces the ``engine`` of all attention settings.
        memory: Lengths at which memory is measured.
        models: Whole models by name.
        floor: Peak rates of the device; None: the column ``ms_floor`` is empty.
    """

    run: RunSettings
    shapes: ShapeSettings
    cases: dict[str, CaseSettings]
    attention: InfLLMConfig = field(default_factory=InfLLMConfig)
    variants: dict[str, InfLLMConfig] = field(default_factory=dict)
    engines: tuple[Literal["auto", "flex", "fused"], ...] = ("auto",)
    memory: MemorySettings = field(default_factory=MemorySettings)
    models: dict[str, ModelSettings] = field(default_factory=dict)
    floor: FloorSettings | None = None

    def __post_init__(self) -> None:
        if not self.engines or len(set(self.engines)) < len(self.engines):
            raise ValueError(
                f"engines must name at least one engine, none twice, got {list(self.engines)}"
            )
        for name in self.variants:
            if not re.fullmatch(r"[a-z0-9_]+", name) or name == "default":
                raise ValueError(
                    f"variants must have names of small letters, digits and _; default is "
                    f"reserved for attention, got {name!r}"
                )
        self._check_lengths()
        self._check_pages()

    def _check_pages(self) -> None:
        sizes = {case.page_size for case in self.cases.values() if case.page_size}
        for name, config in self.attentions.items():
            for page_size in sizes:
                try:
                    window_entries(config, page_size)
                except (ValueError, NotImplementedError) as error:
                    section = f"variants.{name}" if name else "attention"
                    raise ValueError(
                        f"cases with page_size need other {section}: {error}"
                    ) from error

    def _check_lengths(self) -> None:
        shortest = min((n for case in self.cases.values() for n in case.lengths), default=None)
        for name, config in self.attentions.items():
            if shortest is not None and config.is_dense(shortest):
                section = f"variants.{name}" if name else "attention"
                raise ValueError(
                    f"cases must be sparse, got a length of {shortest}, below {section}.dense_len "
                    f"= {config.dense_len}: use longer ones, or dense_len: -1, which is always "
                    "sparse"
                )

    @property
    def timed_modes(self) -> set[CaseMode]:
        """The modes of cases with lengths, of memory and of models; if none, forward+backward."""
        modes: set[CaseMode] = {case.mode for case in self.cases.values() if case.lengths}
        modes |= {model.mode for model in self.models.values()}
        if self.memory.lengths or not modes:
            modes.add("forward+backward")
        return modes

    @property
    def attentions(self) -> dict[str, InfLLMConfig]:
        """All attention settings to measure by name; the name of ``attention`` is empty."""
        return {"": self.attention, **self.variants}

    def with_attention(self, name: str) -> BenchmarkSettings:
        """Return the same run with only one of ``attentions``."""
        return replace(self, attention=self.attentions[name], variants={})

    def with_batch_of(self, case: CaseSettings) -> BenchmarkSettings:
        """Return the same run with the batch of a case."""
        if case.batch is None:
            return self
        return replace(self, shapes=replace(self.shapes, batch=case.batch))
