"""Tables and panels of the quickstart."""

from __future__ import annotations

from evaluation.bars import Panel
from evaluation.quickstart_arms import DENSE
from evaluation.saved_results import Result
from evaluation.table import format_table

NOTE = (
    "All but dense attend to equally many keys. sparse: small blocks, each key is scored; coarse:\n"
    "blocks of 64, scored by means of 32 keys, as in the released 8B checkpoints; window: no\n"
    "selection. sparse compares the mean query of a group with every key. On a CPU, and at this\n"
    "length, fewer keys save no time; docs/choosing-settings.md has the times of GPUs."
)


def times(pretrained: dict[str, Result], tiny: dict[str, Result]) -> str:
    """Format the CPU-seconds of each part, parts of earlier runs included."""
    parts = {f"reading, {name}": r["cpu"] for name, r in pretrained.items()}
    parts["training, short"] = tiny[DENSE]["short"]
    parts |= {f"training, {name}": r["training"] for name, r in tiny.items()}
    return "; ".join(f"{name} {seconds:.0f}" for name, seconds in parts.items())


def pretrained_table(found: dict[str, Result]) -> str:
    """Format one row for each arm."""
    header = ["", "keys attended", "hidden words recalled", "nats per token", "CPU s"]
    cells = [
        [name, f"{r['keys']:.1%}", fraction_right(r), f"{r['nats']:.3f}", f"{r['cpu']:.0f}"]
        for name, r in found.items()
    ]
    return format_table(header, cells)


def tiny_table(found: dict[str, Result]) -> str:
    """Format one row for each arm."""
    header = ["", "keys attended", "questions right", "CPU s of fine-tuning"]
    cells = [
        [name, f"{r['keys']:.1%}", fraction_right(r), f"{r['training']:.0f}"]
        for name, r in found.items()
    ]
    return format_table(header, cells)


def fraction_right(result: Result) -> str:
    """Format the fraction of correct answers."""
    return f"{result['right'] / max(1, result['asked']):.0%} of {result['asked']}"


def recall(found: dict[str, Result]) -> dict[str, float]:
    """Return the fraction of correct answers by arm."""
    return {name: r["right"] / max(1, r["asked"]) for name, r in found.items()}


def keys_of(found: dict[str, Result]) -> dict[str, float]:
    """Return the fraction of keys that is attended to, by arm."""
    return {name: r["keys"] for name, r in found.items()}


def pretrained_panels(found: dict[str, Result]) -> list[Panel]:
    """Return the first row of the picture."""
    dense = found[DENSE]["nats"]
    more = {name: r["nats"] - dense for name, r in found.items()}
    return [
        Panel("keys a query attends to (fewer is cheaper)", keys_of(found), "{:.1%}"),
        Panel("hidden words recalled (more is better)", recall(found)),
        Panel("nats per token above dense (less is better)", more, "{:+.3f}"),
    ]


def tiny_panels(found: dict[str, Result]) -> list[Panel]:
    """Return the second row of the picture."""
    return [
        Panel("keys a query attends to (fewer is cheaper)", keys_of(found), "{:.1%}"),
        Panel("questions answered right (more is better)", recall(found)),
        Panel("CPU-seconds of fine-tuning", {n: r["training"] for n, r in found.items()}, "{:.0f}"),
    ]
