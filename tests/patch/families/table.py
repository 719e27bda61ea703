"""The verdicts as a page of the docs."""

from __future__ import annotations

import re
from collections import Counter

from tests.patch.families.overrides import AS_RELEASED

Row = dict[str, str]

_HEAD = """# Models

`scripts/families.py` writes this page; do not edit it. It covers every type in the causal LM
mapping of transformers {versions}: {counts}.

Each type is built tiny with random weights, patched, and compared:

- below `dense_len` with the unpatched model, bit for bit: forward, gradients, padding on either
  side, greedy generation;
- with every block selected, beyond `dense_len`, with the unpatched model, within rounding: the
  same, and step by step and in chunks over a cache that grows past `dense_len`;
- documents packed by `cu_seq_lens` or `position_ids` with each document alone;
- sparse steps, padded rows and packed documents with one sparse forward pass;
- after `unpatch_model`, with the unpatched model, bit for bit.

A comparison that the unpatched model cannot make is left out; `docs/results/families.csv` lists
those by type. `sound` means that every comparison that was made holds.
"""
_SECTIONS = (
    ("fault", "At fault", "faults"),
    ("sound", "Sound", "left"),
    ("refused", "Refused when patching", "why"),
    ("not built", "Not built", "why"),
)


def format_table(rows: list[Row]) -> str:
    """Markdown of all rows, by verdict."""
    counts = Counter(row["result"] for row in rows)
    versions = sorted({row["transformers"] for row in rows})
    summary = ", ".join(f"{counts[r]} {title.lower()}" for r, title, _ in _SECTIONS if counts[r])
    parts = [_HEAD.format(versions=" and ".join(versions), counts=summary)]
    for result, title, column in _SECTIONS:
        if counts[result]:
            chosen = [row for row in rows if row["result"] == result]
            parts.append(f"## {title}\n\n{_format(chosen, result == 'sound', column)}")
    return "\n".join(parts)


def _format(rows: list[Row], with_layers: bool, column: str) -> str:
    head = ["type", "class", *(["sparse layers"] if with_layers else []), "why"]
    if with_layers:
        head[-1] = "the other layers"
    lines = [head, ["---"] * len(head)]
    for row in rows:
        layers = [f"{row['sparse']} of {row['layers']}"] if with_layers else []
        words = row[column].replace(": left as it was", "").replace("|", "\\|")
        words = words.removeprefix(f"{row['class']} cannot be patched: found ")
        words = re.sub("tried the registry.*?; ", "", words)
        built = ", ".join(f"`{k}={v!r}`" for k, v in AS_RELEASED.get(row["type"], {}).items())
        words = "; ".join(filter(None, (words, built and f"built with {built}")))
        lines.append([f"`{row['type']}`", f"`{row['class']}`", *layers, words])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
