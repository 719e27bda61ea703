#!/usr/bin/env python3
"""Compare every causal LM type of transformers, tiny and random, patched with unpatched.

    scripts/families.py                     all types that have no row for these versions yet
    scripts/families.py --types llama,doge  these types, even if they have one
    scripts/families.py --table             only write docs/models.md

Each type runs in a process of its own and adds its row to docs/results/families.csv when it ends;
the same command continues after an interruption. At the end docs/models.md is written.

Exit status: 0 no fault, 1 at least one fault, 2 a mistake in the command, 130 stopped.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from commands.standard_output import run_command

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT / "docs/results/families.csv"
TABLE = ROOT / "docs/models.md"
COLUMNS = (
    *("type", "class", "result", "why", "sparse", "layers", "left", "faults", "not_asked"),
    *("seconds", "transformers", "torch", "commit", "date"),
)
VERSIONS = ("transformers", "torch", "commit")
Row = dict[str, str]


def main() -> int:
    """Run the command and return its exit status."""
    args = parse_arguments()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for several threads
    from tests.patch.families.table import format_table
    from tests.patch.families.tiny import TYPES

    named = args.types.split(",") if args.types else []
    if unknown := [t for t in named if t not in TYPES]:
        print(f"error: no causal LM types of transformers: {', '.join(unknown)}", file=sys.stderr)
        return 2
    rows, versions = read_rows(), read_versions()
    stopped = False
    try:
        if not args.table:
            left = [t for t in TYPES if not is_done(rows.get(t), versions)]
            for row in run(named or left, args, versions):
                rows[row["type"]] = row
                write_rows([rows[t] for t in TYPES if t in rows])
    except KeyboardInterrupt:
        print("stopped: run the same command to continue with the other types", file=sys.stderr)
        stopped = True
    rows = {t: rows[t] for t in TYPES if t in rows}
    TABLE.write_text(format_table(list(rows.values())))
    return 130 if stopped else int(any(row["result"] == "fault" for row in rows.values()))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", help="model types, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of each type")
    parser.add_argument("--gigabytes", type=float, default=6, help="memory limit of each type")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    return parser.parse_args()


def read_rows() -> dict[str, Row]:
    """Read the rows of the CSV by type."""
    if not CSV.exists():
        return {}
    with CSV.open(newline="") as file:
        return {row["type"]: row for row in csv.DictReader(file)}


def write_rows(rows: list[Row]) -> None:
    """Replace the CSV in one operation, so that a stopped run leaves a complete file."""
    beside = CSV.with_suffix(".csv.tmp")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(CSV)


def read_versions() -> Row:
    """Return the versions on which a result depends."""
    import torch
    import transformers

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        return done.stdout.strip()

    code = ("infllm_flex", "custom_ops", "tests/patch/families")
    changed = "+changes" if git("status", "--porcelain", "--", *code) else ""
    commit = git("log", "-1", "--format=%h", "--", *code) + changed
    return {"transformers": transformers.__version__, "torch": torch.__version__, "commit": commit}


def is_done(row: Row | None, versions: Row) -> bool:
    """Tell whether a row was made with these versions."""
    return row is not None and all(row[name] == versions[name] for name in VERSIONS)


def run(types: list[str], args: argparse.Namespace, versions: Row) -> Iterator[Row]:
    """Yield a row for each type, in the order in which they end."""
    from tqdm import tqdm

    import tests.patch.families.examine  # noqa: F401 - imported once, before the processes fork

    waiting = list(types)
    running: dict[Connection, Job] = {}
    with tqdm(
        total=len(types), unit="type", dynamic_ncols=True, file=sys.stderr, disable=None
    ) as bar:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                job = Job(waiting.pop(0), args.gigabytes)
                running[job.connection] = job
            bar.set_postfix_str(" ".join(job.type for job in running.values()))
            multiprocessing.connection.wait(list(running), timeout=1)
            for connection, job in list(running.items()):
                if (row := job.poll(args.seconds)) is not None:
                    del running[connection]
                    bar.update()
                    words = row["result"] + (f": {row['faults']}" if row.get("faults") else "")
                    bar.write(f"{job.type}: {words}", file=sys.stderr)
                    yield {**dict.fromkeys(COLUMNS, ""), **versions, **row}


class Job:
    """The process of one type."""

    def __init__(self, model_type: str, gigabytes: float) -> None:
        context = multiprocessing.get_context("fork")
        receiving, sending = context.Pipe(duplex=False)
        self.type = model_type
        self.connection: Connection = receiving
        self._started = time.monotonic()
        self._process: BaseProcess = context.Process(
            target=_examine, args=(model_type, gigabytes, sending), daemon=True
        )
        self._process.start()
        sending.close()

    def poll(self, seconds: float) -> Row | None:
        """Return the row; None while the process runs."""
        lasted = time.monotonic() - self._started
        if self.connection.poll():
            try:
                row = self.connection.recv()
            except EOFError:
                self._process.join()
                row = _fault(f"its process ended with status {self._process.exitcode}")
        elif lasted > seconds:
            self._process.kill()
            row = _fault(f"not done after {seconds:g} s")
        else:
            return None
        self._process.join()
        self.connection.close()
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
        return {**row, "type": self.type, "seconds": f"{lasted:.1f}", "date": now}


def _fault(words: str) -> Row:
    return {"result": "fault", "faults": words}


def _examine(model_type: str, gigabytes: float, connection: Connection) -> None:
    import resource
    import signal
    import warnings

    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from tests.patch.families.examine import examine

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        verdict = examine(model_type)
        row = {
            name: " | ".join(value) if isinstance(value, tuple) else str(value)
            for name, value in verdict._asdict().items()
        }
    except BaseException as error:
        row = _fault(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    connection.send({**row, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]})


if __name__ == "__main__":
    sys.exit(run_command(main))
