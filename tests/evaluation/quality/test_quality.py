"""The command from a base to a table: interrupted, shared, and with invalid settings."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from evaluation.quality.arms import attention_modes
from evaluation.quality.parts import Folder
from evaluation.quality.plan import plan
from evaluation.quality.processes import run_in_processes
from evaluation.quality.settings import QualitySettings
from evaluation.quality.tuning import training_settings
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from tests.checkout import ROOT, environment
from tests.evaluation.quality.tiny import LENGTH, make_base, make_texts, settings_of, write_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def config(tmp_path, base, texts):
    """A comparison of one seed and two retrieval tasks."""
    settings = settings_of(tmp_path / "run", base, texts)
    settings["run"]["seeds"] = [0]
    settings["judge"] |= {"tasks": ["keys12", "steps"], "groups": ["retrieval", "nats"]}
    settings["variants"]["fine"]["back_to_dense"] = False
    return write_settings(tmp_path / "quality.yaml", settings)


def start(config, *arguments, **options):
    command = [sys.executable, str(ROOT / "scripts/quality.py"), "--config", str(config)]
    return subprocess.Popen(
        [*command, *arguments],
        env=environment(OMP_NUM_THREADS="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def run(config, *arguments):
    process = start(config, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def interrupt(process, is_time, number=signal.SIGTERM):
    """Send a signal to a command once it is time, and check what the command says."""
    deadline = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err.strip().endswith("run the same command to continue after the last finished part")


def parts_of(config):
    settings = build_dataclass(QualitySettings, load_yaml(config))
    folder, parts = Folder(settings.run.folder), plan(settings)
    return {part.name: folder.result(part) for part in parts}


@pytest.mark.slow
def test_everything_from_a_base_to_a_table(tmp_path, base, texts):
    settings = settings_of(tmp_path / "run", base, texts)
    config = write_settings(tmp_path / "quality.yaml", settings)
    status, out, err = run(config)
    assert status == 0, err
    assert all(result is not None for result in parts_of(config).values())
    with (tmp_path / "run" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == {
        *("dense", "fine", "window", "random"),
        *("dense->fine", "dense->window", "dense->random", "fine->dense"),
    }
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert {row["visible"] for row in rows if row["run"] == "dense"} == {"512"}
    assert {row["visible"] for row in rows if row["run"] != "dense"} == {"64"}
    for row in rows:
        if row["hits_by_depth"]:
            pairs = [tuple(map(int, pair.split("/"))) for pair in row["hits_by_depth"].split()]
            assert sum(right for right, _ in pairs) == int(row["hits"])
            assert sum(asked for _, asked in pairs) == int(row["items"])
    assert (tmp_path / "run" / "plot.png").stat().st_size > 10_000
    assert "steps_generated" in out
    assert "gap window-dense closed" in out


def test_without_tuning_the_base_is_judged_as_it_is(tmp_path, base, texts):
    settings = settings_of(tmp_path / "run", base, texts)
    del settings["tuning"]
    settings["judge"] |= {
        "length": LENGTH,
        "questions": 3,
        "tasks": ["keys12"],
        "groups": ["retrieval", "nats"],
    }
    config = write_settings(tmp_path / "quality.yaml", settings)
    status, out, err = run(config)
    assert status == 0, err
    assert "nothing was trained" in out
    assert not (tmp_path / "run" / "models").exists()
    with (tmp_path / "run" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows if row["task"] == "keys12" and row["seed"] == "1"] == [
        *("dense", "fine", "window", "random")
    ]
    assert {row["tuned"] for row in rows} == {""}
    read = [row for row in rows if row["task"].startswith("nats:")]
    assert {row["seed"] for row in read} == {"0"}  # another seed has the same text
    nats = {row["variant"]: row["value"] for row in read}
    assert len(set(nats.values())) == len(nats)  # each attends in its own way


def test_without_tuning_no_weights_are_copied_and_none_may_change(tmp_path, texts):
    own = make_base(tmp_path / "own")
    settings = settings_of(tmp_path / "run", own, texts)
    del settings["tuning"]
    settings["judge"] |= {"length": LENGTH, "groups": ["nats"]}
    config = write_settings(tmp_path / "quality.yaml", settings)
    assert run(config, "--parts", "judge:dense:0:nats")[0] == 0
    weights = tmp_path / "run" / "base" / "model.safetensors"
    assert weights.is_symlink()
    assert weights.samefile(own / "model.safetensors")
    (own / "model.safetensors").touch()
    status, _, err = run(config, "--list")
    assert status == 0, err
    status, _, err = run(config)
    assert status == 2
    (line,) = err.splitlines()
    assert "model.safetensors is gone or has changed since this run began" in line


def test_an_interrupted_run_goes_on_where_it_was(config):
    interrupt(start(config), lambda: parts_of(config)["train:dense:0"] is not None)
    done = {name for name, result in parts_of(config).items() if result is not None}
    assert {"base", "text", "train:dense:0"} <= done < set(parts_of(config))
    status, out, err = run(config, "--parts", "judge:dense:*,judge:fine:0:nats")
    assert status == 0, err
    # No part is done twice; only the given parts, and those they need, are done.
    begun = [line.split()[0] for line in err.splitlines() if line.endswith(" ...")]
    assert not done & set(begun)
    assert {"judge:dense:0:retrieval", "judge:dense:0:nats"} <= done | set(begun)
    assert "train:fine:0" in begun
    assert not any("window" in name for name in begun)
    assert "parts are not done" in out


@pytest.mark.slow
def test_a_training_that_is_stopped_is_saved_and_goes_on(config, tmp_path):
    more = ("tuning.steps=80", "--parts", "train:dense:0")
    metrics = tmp_path / "run" / "models" / "dense-0" / "metrics.jsonl"
    process = start(config, *more)
    interrupt(process, lambda: metrics.exists() and metrics.read_text(), signal.SIGINT)
    (saved,) = (metrics.parent / "checkpoints").glob("step*")
    assert 10 <= int(re.search(r"\d+", saved.name)[0]) < 80
    status, _, err = run(config, *more)
    assert status == 0, err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(10, 81, 10))
    assert not (metrics.parent / "checkpoints").exists()


def test_what_cannot_be_done_here_is_skipped_with_a_word(config):
    added = ("judge.groups=[ruler]", "judge.ruler_lengths=[256]")
    status, out, err = run(config, *added, "--parts", "judge:dense:0:ruler")
    assert status == 0, err
    # With lm-eval, a tokenizer of bytes makes too many tokens of a prompt.
    reason = "ruler_vt has" if importlib.util.find_spec("lm_eval") else "pip install '.[quality]'"
    assert reason in err
    assert "skipped: judge:dense:0:ruler" in out


def test_processes_that_share_a_folder_do_each_part_once(config):
    pair = [start(config, "--parts", "train:dense:0,judge:dense:*") for _ in range(2)]
    errors = []
    for process in pair:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        errors.append(err)
    begun = [line for err in errors for line in err.splitlines() if line.endswith(" ...")]
    assert len(begun) == len(set(begun)) == 5


def test_one_command_starts_processes_that_share_the_parts(config):
    status, out, err = run(
        config, "--parts", "judge:dense:0:*,judge:fine:0:nats", "--processes", "2"
    )
    assert status == 0, err
    begun = [line for line in err.splitlines() if line.endswith(" ...")]
    assert len(begun) == len(set(begun)) == 7
    assert out.count("Accuracy at") == 1  # one table, of what all of them have done
    assert out.count("fine ") == 1


def test_processes_stop_together_and_leave_what_is_done(config):
    process = start(config, "--processes", "2")
    interrupt(process, lambda: parts_of(config)["text"] is not None)
    status, _, err = run(config, "--processes", "0")
    assert status == 2
    assert err.endswith("--processes must be at least 1, got 0\n")


@pytest.mark.parametrize(
    ("chosen", "uses_gpus", "seen"),
    [("3,GPU-7", True, ["3", "GPU-7", "3"]), ("3", False, ["3"] * 3), ("", True, [""] * 3)],
)
def test_processes_are_spread_over_the_visible_gpus(monkeypatch, tmp_path, chosen, uses_gpus, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    code = f"""import os, pathlib
file = pathlib.Path({str(tmp_path)!r}) / str(os.getpid())
file.write_text(os.environ["CUDA_VISIBLE_DEVICES"])"""
    assert run_in_processes(["-c", code], 3, uses_gpus) == 0
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == sorted(seen)
    assert run_in_processes(["-c", "raise SystemExit(7)"], 2, uses_gpus) == 7


@pytest.fixture
def refused(config, monkeypatch, capsys):
    """Return the message to overrides that the command refuses; in this process, to be quick."""
    spec = importlib.util.spec_from_file_location("quality", ROOT / "scripts/quality.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # restored after the test

    def refuse(*overrides):
        monkeypatch.setattr(sys, "argv", ["quality.py", "--config", str(config), *overrides])
        assert script.main() == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.strip().splitlines()
        return line

    return refuse


def test_what_cannot_be_used_is_said_in_one_line_before_any_work(tmp_path, refused, base):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "folder: must be a local folder" in refused("base.folder=/nowhere")
    assert "is not installed" in refused("base.folder=null", "base.package=no_such_thing")
    assert "has 1024 tokens, the model has positions for 512" in refused("tuning.length=1024")
    assert "has 700 tokens, the model has positions for 512" in refused("judge.length=700")
    assert "no file *.txt" in refused(f"text.source={empty}")
    variant = "variants.fine.selection_loss"
    assert "above 0 and at most 1000, got 0.0" in refused(f"{variant}.weight=0")
    said = refused(f"{variant}.queries=600")
    assert "variants.fine: selection_loss must have queries of at most max_length = 512" in said
    assert "left out where trained is false" in refused(
        f"{variant}.weight=1", "variants.fine.trained=false", "variants.fine.back_to_dense=false"
    )
    assert "no part matches nothing" in refused("--parts", "nothing")
    assert not (tmp_path / "run").exists()
    other = tmp_path / "other"
    other.mkdir()
    description = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(description | {"model_type": "no_such_model"}))
    assert "no_such_model" in refused(f"base.folder={other}")
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "base: " in refused(f"base.folder={other}")


def test_without_tuning_a_length_and_a_variant_are_needed(tmp_path, base, texts):
    for changes, wanted in (
        ({}, "judge.length must be given"),
        ({"length": 400}, "training_free"),
    ):
        settings = settings_of(tmp_path / "run", base, texts)
        del settings["tuning"]
        settings["judge"] |= changes
        settings["variants"]["fine"]["training_free"] = not changes
        config = write_settings(tmp_path / "quality.yaml", settings)
        status, _, err = run(config)
        assert (status, len(err.splitlines())) == (2, 1)
        assert wanted in err


def test_tasks_that_do_not_fit_are_told_before_any_training(config):
    status, _, err = run(config, "judge.length=100")
    assert status == 1
    assert "step/s" not in err  # no bar of a training
    assert err.splitlines()[-1].startswith("error: judge: steps: a sequence of 101 tokens is too")
    status, _, err = run(config, "judge.questions=0")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "judge.questions: must be at least 1, got 0" in err


def test_a_device_without_memory_is_one_line_that_says_what_to_do(config, monkeypatch, capsys):
    import quality

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.94 GiB. GPU 0 has")

    monkeypatch.setattr(quality.Worker, "do", fail)
    monkeypatch.setattr(quality, "stop_on_signals", lambda _: None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command replaces it
    monkeypatch.setattr(sys, "argv", ["quality.py", "--config", str(config)])
    assert quality.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CUDA out of memory. To need less: judge.batch_size=1")


def test_a_folder_of_other_settings_is_refused(config, refused, tmp_path):
    assert run(config, "--parts", "base")[0] == 0
    assert "holds base with another base" in refused("base.rope_theta=50000")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "file").write_text("")
    assert "holds something else" in refused(f"run.folder={tmp_path / 'strange'}")


def test_the_config_gives_all_variants_and_controls_as_many_tokens():
    path = ROOT / "configs" / "quality_smollm2_16k.yaml"
    settings = build_dataclass(QualitySettings, load_yaml(path))
    visible = {mode.visible(settings.length) for mode in attention_modes(settings).values()}
    assert visible == {2048, 16384}
    window, random = (attention_modes(settings)[name].attention for name in ("window", "random"))
    for control in (window, random):  # controls ignore scores, hence have cheap ones
        assert control.kernel_stride == control.block_size // 4
        assert control.block_size == settings.control_attention.block_size
    assert random.window_size == settings.control_attention.window_size
    forced = window.init_blocks + window.local_blocks + 1
    assert window.num_selected == forced == settings.control_attention.num_selected


def test_new_variants_leave_what_is_done_alone(config):
    settings = build_dataclass(QualitySettings, load_yaml(config))
    import yaml

    described = yaml.safe_load(config.read_text())
    other = dict(described["variants"]["fine"]["attention"]) | {"topk": 12}
    described["variants"]["wide"] = {"attention": other}
    described["variants"]["taught"] = {"attention": other, "selection_loss": {"weight": 0.5}}
    write_settings(config, described)
    more = build_dataclass(QualitySettings, load_yaml(config))
    after = {part.name: part.settings for part in plan(more)}
    for part in plan(settings):
        assert after[part.name] == part.settings
    without, taught = (after[f"train:{name}:0"][name] for name in ("wide", "taught"))
    assert taught.pop("selection_loss") == {"weight": 0.5, "every": 1, "queries": 256}
    assert taught == without
    place = more.base.folder
    recipe = training_settings(
        more, attention_modes(more)["taught"], 0, place, place, torch.device("cpu")
    )
    assert recipe.stages["long"].selection_loss.weight == 0.5
