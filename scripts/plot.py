#!/usr/bin/env python3
"""Draw the results of scripts/benchmark.py.

    scripts/plot.py docs/results/bench_cpu.csv

Writes NAME_speed_up.png and NAME_stages.png beside the CSV and replaces earlier ones. Where a shape
was measured several times, the newest rows count.

Exit status: 0 done, 1 matplotlib is missing, 2 a file that is no such CSV or holds nothing to draw.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarking.plots import plot_speed_up, plot_stages
from benchmarking.results import read_results
from commands.messages import NO_PLOT
from commands.standard_output import run_command


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="a file of scripts/benchmark.py")
    csv = parser.parse_args().csv
    try:
        rows = read_results(csv)
        for name, plot in (("speed_up", plot_speed_up), ("stages", plot_stages)):
            path = csv.with_name(f"{csv.stem}_{name}.png")
            plot(path, rows)
            print(path)
    except ImportError:
        print(NO_PLOT, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
