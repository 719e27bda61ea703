"""The command from a base to a table, with and without tuning."""

from __future__ import annotations

import csv
import importlib.util

import pytest

from tests.evaluation.quality.command import parts_of, run
from tests.evaluation.quality.tiny import LENGTH, make_base, settings_of, write_settings


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


def test_what_cannot_be_done_here_is_skipped_with_a_word(config):
    added = ("judge.groups=[ruler]", "judge.ruler_lengths=[256]")
    status, out, err = run(config, *added, "--parts", "judge:dense:0:ruler")
    assert status == 0, err
    # With lm-eval, a tokenizer of bytes makes too many tokens of a prompt.
    reason = "ruler_vt has" if importlib.util.find_spec("lm_eval") else "pip install '.[quality]'"
    assert reason in err
    assert "skipped: judge:dense:0:ruler" in out
