#!/usr/bin/env python3
"""Show what settings keep of dense quality beside what they cost.

    scripts/plot_quality_time.py QUALITY.csv TIMES.csv [--heads 9/3]

Joins a CSV of scripts/quality.py and one of scripts/benchmark.py by the names of their variants.
Prints a table, in which * marks settings that no other one beats in quality and speed, and draws
NAME_time.png beside the first CSV. Seeds are shown from the worst to the best.

Exit status: 0 done, 1 matplotlib is missing, 2 files that are no such CSVs or have nothing
in common.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from benchmarking.results import read_results
from commands.messages import NO_PLOT
from commands.standard_output import run_command
from evaluation.quality_time import plot, points, table


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quality", type=Path, help="a file of scripts/quality.py")
    parser.add_argument("times", type=Path, help="a file of scripts/benchmark.py")
    parser.add_argument(
        "--heads", metavar="PAIR", help="query and key/value heads, where TIMES.csv has several"
    )
    parser.add_argument(
        "--tasks",
        default="single,keys12,keys200,key1,key2,key4",
        metavar="NAMES",
        help="tasks whose answers are counted together (default: %(default)s)",
    )
    parser.add_argument(
        "--default",
        default="w32_b64",
        metavar="NAME",
        help="name in QUALITY.csv of what the benchmark's config has under attention: "
        "(default: %(default)s)",
    )
    options = parser.parse_args()
    try:
        quality = _read_quality(options.quality)
        times = _of_heads(read_results(options.times), options.heads)
        found = points(quality, times, options.tasks.split(","), options.default)
        print(table(found))
        path = options.quality.with_name(f"{options.quality.stem}_time.png")
        row = times[-1]
        title = (
            f"blue: tuned with this attention, orange: tuned densely; times of {row['Hq']}/"
            f"{row['Hkv']} heads, head dim {row['D']}, {row['device']}"
        )
        plot(path, found, title)
        print(path)
    except ImportError:
        print(NO_PLOT, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _of_heads(rows: list[dict[str, str]], heads: str | None) -> list[dict[str, str]]:
    some = [row for row in rows if heads in (None, f"{row['Hq']}/{row['Hkv']}")]
    if not some:
        raise ValueError(f"expected times of {heads} heads, got none")
    return some


def _read_quality(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"tuned", "run", "task", "seed", "hits"} <= rows[0].keys():
        raise ValueError(f"{path}: expected a CSV of scripts/quality.py")
    return rows


if __name__ == "__main__":
    sys.exit(run_command(main))
