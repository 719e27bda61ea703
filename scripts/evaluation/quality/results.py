"""The results of all finished parts of a comparison."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.quality.arms import Arm, arms, attention_modes
from evaluation.quality.names import STEPS
from evaluation.quality.parts import Folder, Part
from evaluation.quality.plan import judge_name
from evaluation.quality.settings import QualitySettings

GENERATED = f"{STEPS}_generated"
GENERATED_WHOLE = f"{GENERATED}_whole"  # programs of which every line is right
COLUMNS = (
    *("variant", "tuned", "run", "task", "seed", "length", "visible"),
    *("items", "hits", "value", "hits_by_depth", "seconds"),
    *("device", "torch", "triton", "transformers", "commit", "date"),
)


@dataclass(frozen=True)
class Results:
    """Results by arm, seed and group.

    Attributes:
        settings: All settings.
        found: The result of each finished part.
    """

    settings: QualitySettings
    found: dict[tuple[Arm, int, str], dict[str, Any]]

    def seeds(self, group: str, *some: Arm) -> list[int]:
        """Return the seeds for which a group is done for all of these arms."""
        return [
            seed
            for seed in self.settings.run.seeds
            if all((arm, seed, group) in self.found for arm in some)
        ]

    def arms(self, group: str) -> list[Arm]:
        """Return the arms for which a group is done for at least one seed."""
        return [arm for arm in arms(self.settings) if self.seeds(group, arm)]

    def visible(self, arm: Arm) -> int:
        """Return the largest number of tokens that a query sees."""
        return attention_modes(self.settings)[arm.run].visible(self.settings.length)

    def tasks(self) -> list[str]:
        """Return the tasks with correct answers to count that are done for at least one arm."""
        found = [t for t in self.settings.judge.tasks if self.arms("retrieval")]
        ruler = {
            task
            for (_, _, group), result in self.found.items()
            if group == "ruler"
            for task in result["tasks"]
        }
        generated = [GENERATED, GENERATED_WHOLE] if self.arms("generation") else []
        return [*found, *generated, *sorted(ruler)]

    def hits(self, task: str, *some: Arm) -> list[Tensor] | None:
        """Return correct answers ``[seeds, sequences]`` of each arm, for the seeds of all arms.

        Where nothing was trained, seeds differ in questions only: their sequences are those of one
        seed.
        """
        group = group_of(task)
        seeds = [
            seed
            for seed in self.seeds(group, *some)
            if all(_hits(self.found[arm, seed, group], task) is not None for arm in some)
        ]
        if not seeds:
            return None
        found = [
            torch.tensor(
                [
                    [sum(row) for row in _hits(self.found[arm, seed, group], task) or []]
                    for seed in seeds
                ]
            )
            for arm in some
        ]
        return found if self.settings.tuning else [hits.flatten()[None] for hits in found]

    def accuracy(self, task: str, arm: Arm) -> float:
        """Return the fraction of correct answers over all seeds; nan where none is done."""
        group, right, asked = group_of(task), 0, 0
        for seed in self.seeds(group, arm):
            rows = _hits(self.found[arm, seed, group], task) or []
            right += sum(map(sum, rows))
            asked += sum(map(len, rows))
        return right / asked if asked else float("nan")

    def nats(self, bucket: str, *some: Arm) -> list[Tensor] | None:
        """Return nats ``[seeds, windows]`` of each arm, for the seeds of all arms."""
        seeds = self.seeds("nats", *some)
        if not seeds:
            return None
        return [
            torch.tensor([self.found[arm, s, "nats"]["buckets"][bucket] for s in seeds])
            for arm in some
        ]

    def seconds(self, arm: Arm) -> float | None:
        """Return the mean seconds of a sequence; None where retrieval is not done."""
        seeds = self.seeds("retrieval", arm)
        times = [self.found[arm, seed, "retrieval"]["seconds"] for seed in seeds]
        return sum(times) / len(times) if times else None


def gather(settings: QualitySettings, folder: Folder, parts: Sequence[Part]) -> Results:
    """Read the results of all finished parts."""
    by_name = {part.name: part for part in parts}
    found = {}
    for arm in arms(settings):
        for seed in settings.run.seeds:
            for group in settings.judge.groups:
                part = by_name.get(judge_name(arm, seed, group))
                result = folder.result(part) if part else None
                if result is not None:
                    found[arm, seed, group] = result
    return Results(settings, found)


def group_of(task: str) -> str:
    """Return the group of a task."""
    if task in (GENERATED, GENERATED_WHOLE):
        return "generation"
    return "ruler" if "@" in task else "retrieval"


def write_table(results: Results, path: Path) -> None:
    """Write the whole CSV: a row for each arm, task and seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for (arm, seed, group), result in results.found.items():
            common = {
                "variant": arm.name,
                "tuned": "" if results.settings.tuning is None else arm.tuned,
                "run": arm.run,
                "seed": seed,
                "length": results.settings.length,
                "visible": results.visible(arm),
                **{key: result["environment"].get(key, "") for key in COLUMNS[-6:]},
            }
            for cells in _cells(results, group, result):
                writer.writerow(common | cells)
    os.replace(aside, path)


def _cells(results: Results, group: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    if group in ("retrieval", "ruler"):
        return [
            {"task": task, **_counts(values["hits"], values.get("depths"))}
            | ({"seconds": f"{result['seconds']:.4g}"} if group == "retrieval" else {})
            | ({"length": task.partition("@")[2]} if group == "ruler" else {})
            for task, values in result["tasks"].items()
        ]
    if group == "generation":
        return [
            {"task": task, **_counts(_hits(result, task) or [], None)}
            for task in (GENERATED, GENERATED_WHOLE)
        ]
    if group == "nats":
        return [
            {"task": f"nats:{name}", "items": len(v), "value": f"{sum(v) / len(v):.5f}"}
            for name, v in result["buckets"].items()
        ]
    return [
        {"task": f"{kind}:{layer}", "value": f"{value:.4f}"}
        for kind, layers in result["layers"].items()
        for layer, value in layers.items()
    ]


def _counts(rows: list[list[int]], depths: list[list[int]] | None) -> dict[str, Any]:
    items, hits = sum(map(len, rows)), sum(map(sum, rows))
    cells = {"items": items, "hits": hits, "value": f"{hits / max(items, 1):.4f}"}
    if depths is not None:
        asked, right = [0] * 10, [0] * 10
        for row, places in zip(rows, depths, strict=True):
            for hit, place in zip(row, places, strict=True):
                asked[place] += 1
                right[place] += hit
        cells["hits_by_depth"] = " ".join(f"{r}/{a}" for r, a in zip(right, asked, strict=True))
    return cells


def _hits(result: dict[str, Any], task: str) -> list[list[int]] | None:
    if task == GENERATED:
        return result["hits"]
    if task == GENERATED_WHOLE:
        return [[int(all(row))] for row in result["hits"]]
    return result["tasks"][task]["hits"] if task in result["tasks"] else None
