"""Two and four processes train like one, within rounding, with every kind of parallelism."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from infllm_flex.strict_yaml import to_yaml
from infllm_flex.training.loop import train
from infllm_flex.training.settings import CheckpointSettings, MemorySettings, ParallelSettings
from tests.checkout import ROOT, environment
from tests.tolerance import assert_within_rounding
from tests.training import parallel_checks as checks
from tests.training.forked import run_ranks
from tests.training.runs import settings, stage, write_texts


def torchrun(size, *arguments, **variables):
    """Run torchrun, for two minutes at most."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1", **variables),
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of `parallel_checks` by number of processes, and their folder."""
    known = {}

    def of(size):
        if size not in known:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            write_texts(folder / "texts")
            found = run_ranks(size, folder, checks.run_checks, folder)
            assert isinstance(found[0], dict), found
            known[size] = found[0], folder
        return known[size]

    return of


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and norms of a run of `parallel_checks` in one process, with two micro-batch sizes."""
    folder = tmp_path_factory.mktemp("alone")
    write_texts(folder / "texts")

    @functools.cache
    def of(name):
        both = []
        run = checks.runs(folder)[name]
        run = replace(run, parallel=ParallelSettings(), memory=MemorySettings())
        for at_once in (0, 1):
            stages = {n: replace(s, sequences_at_once=at_once) for n, s in run.stages.items()}
            place = folder / name / str(at_once)
            again = replace(run, run=replace(run.run, folder=place), stages=stages)
            train(again, show=False)
            both.append(torch.tensor(checks.losses(place / "metrics.jsonl")))
        return both

    return of


def assert_same_training(folder, alone):
    whole, in_micro_batches = alone
    found = torch.tensor(checks.losses(folder / "metrics.jsonl"))
    for column in (0, 1):
        assert_within_rounding(
            found[:, column], whole[:, column].double(), in_micro_batches[:, column], factor=3.0
        )


EXACT = [(n, name) for n, names in checks.NAMES.items() for name in names if name != "bfloat16"]


@pytest.mark.parametrize(("size", "name"), EXACT)
def test_several_processes_train_like_one(results, alone, size, name):
    said, folder = results(size)
    assert said[name] == "passed"
    if name == "muon":
        # Muon orthogonalises in bfloat16. On a CPU with AMX a gradient's last bit changes losses by
        # 2e-4 and norms by 3e-3; a learning rate 1 % too high changes them by 14e-3 and 16e-3.
        found = torch.tensor(checks.losses(folder / name / "metrics.jsonl"))
        error = (found - alone(name)[0]).abs().amax(0)
        assert (error <= torch.tensor([1e-3, 6e-3])).all(), error
        return
    assert_same_training(folder / name, alone(name))


def test_bfloat16_arithmetic_over_float32_weights_stays_close(results, alone):
    said, folder = results(2)
    assert said["bfloat16"] == "passed"
    in_bfloat16 = torch.tensor(checks.losses(folder / "bfloat16" / "metrics.jsonl"))
    exact, one_process = alone("fsdp")[0], alone("bfloat16")[0]
    assert not torch.equal(in_bfloat16, exact)
    assert (in_bfloat16[:, 0] - exact[:, 0]).abs().max() < 0.05
    assert (one_process[:, 0] - exact[:, 0]).abs().max() < 0.05


@pytest.mark.parametrize("size", [2, 4])
def test_context_attention_equals_that_of_one_process_and_selects_the_same_blocks(results, size):
    assert results(size)[0]["attention"] == "passed"


@pytest.mark.parametrize("check", ["stopped", "resumed", "nan"])
def test_all_processes_stop_and_resume_together(results, check):
    assert results(2)[0][check] == "passed"


@pytest.mark.parametrize(
    ("processes", "changes", "message"),
    [
        (3, {}, r"stages\.short: batch_size must be a multiple of 3, "),
        (
            2,
            {"parallel": ParallelSettings(context=4)},
            r"parallel\.context must divide the number of processes, 2, got 4",
        ),
        (
            2,
            {"parallel": ParallelSettings(context=2), "stages": {"odd": stage(max_length=34)}},
            r"stages\.odd: max_length must be a multiple of twice parallel\.context = 4, got 34",
        ),
        (1, {"memory": MemorySettings(cpu_offload=True)}, r"memory\.cpu_offload needs torchrun"),
    ],
)
def test_settings_that_do_not_fit_the_number_of_processes_are_refused(
    tmp_path, texts, monkeypatch, processes, changes, message
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    run = settings(tmp_path / "run", texts, **changes)
    with pytest.raises(ValueError, match=message):
        train(run, show=False)
    assert not (tmp_path / "run").exists()


CRASH = """
import os, runpy, sys
from infllm_flex.training import loop
real = loop.take_step
def take_step(state, *args):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and state.done == 4:
        if os.environ["RANK"] == "1":
            os._exit(9)  # as by the kernel, out of memory
    return real(state, *args)
loop.take_step = take_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_torchrun_restarts_a_run_that_lost_a_process_with_the_same_result(tmp_path, texts):
    config, crash = tmp_path / "run.yaml", tmp_path / "crash.py"
    crash.write_text(CRASH)
    run = settings(tmp_path / "crashed", texts, checkpoint=CheckpointSettings(every=2))
    config.write_text(to_yaml(run))
    script = ROOT / "scripts" / "finetune.py"
    ended = torchrun(
        2, "--standalone", "--max-restarts=1", str(crash), str(script), "--config", str(config)
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("6 of 6 steps done; model in ") == 1
    straight = replace(run, run=replace(run.run, folder=tmp_path / "straight"))
    train(straight, show=False)
    found, expected = (
        torch.tensor(checks.losses(tmp_path / name / "metrics.jsonl")).double()
        for name in ("crashed", "straight")
    )
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5
