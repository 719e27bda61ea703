"""Verdicts, tables and plots of known results."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from evaluation.quality.arms import Arm
from evaluation.quality.plot import plot_quality
from evaluation.quality.report import report
from evaluation.quality.results import Results, write_table
from evaluation.quality.settings import QualitySettings
from evaluation.quality.verdicts import closed_gap, mean_of_ruler, retained_accuracy
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from tests.evaluation.quality.tiny import make_base, make_texts, settings_of, write_settings

DENSE, FINE, FREE = Arm("dense", "dense"), Arm("fine", "fine"), Arm("dense", "fine")
WINDOW, RANDOM = Arm("window", "window"), Arm("random", "random")
ENVIRONMENT = {"commit": "abc", "device": "card", "torch": "2", "transformers": "5"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdicts")
    made = settings_of(folder / "run", make_base(folder / "base"), make_texts(folder / "texts"))
    made["judge"]["tasks"] = ["keys12", "keys200", "single"]
    path = write_settings(folder / "quality.yaml", made)
    return build_dataclass(QualitySettings, load_yaml(path))


def rows(right: int, of: int = 10, sequences: int = 20) -> dict:
    hits = [[1] * right + [0] * (of - right)] * sequences
    return {"hits": hits, "depths": [[place % 10 for place in range(of)]] * sequences}


def results_of(settings, answers: dict[Arm, dict[str, int]], nats: dict[Arm, float]) -> Results:
    found = {}
    for seed in settings.run.seeds:
        for arm, by_task in answers.items():
            tasks = {task: rows(right) for task, right in by_task.items()}
            found[arm, seed, "retrieval"] = {
                "tasks": tasks,
                "seconds": 0.5,
                "environment": ENVIRONMENT,
            }
        for arm, cost in nats.items():
            spread = [cost + 0.1 * document for document in range(3)]
            names = ("1-64", "65-128", "129-256", "257-512")
            found[arm, seed, "nats"] = {
                "buckets": dict.fromkeys(names, spread),
                "environment": ENVIRONMENT,
            }
    return Results(settings, found)


def test_a_share_stands_only_where_controls_fail_and_dense_does_not(settings):
    answers = {
        DENSE: {"keys12": 10, "keys200": 10, "single": 4},
        FINE: {"keys12": 9, "keys200": 9, "single": 4},
        WINDOW: {"keys12": 1, "keys200": 9, "single": 1},
        RANDOM: {"keys12": 2, "keys200": 1, "single": 1},
    }
    results = results_of(settings, answers, {})
    found = retained_accuracy(results, FINE, "keys12")
    assert found.share == pytest.approx((0.9, 0.9 - 0.0069, 0.9 + 0.0069), abs=1e-4)
    assert found.remark == ""
    assert retained_accuracy(results, FINE, "keys200").remark == "no evidence: window keeps 0.90"
    assert retained_accuracy(results, FINE, "single").remark == "dense answers 0.40"
    assert retained_accuracy(results, DENSE, "keys12") is None
    assert retained_accuracy(results, FREE, "keys12") is None  # not judged


def test_what_is_no_better_than_a_control_is_said_to_be(settings):
    answers = {DENSE: {"keys12": 10}, FREE: {"keys12": 2}}
    answers |= {Arm("dense", "window"): {"keys12": 1}, Arm("dense", "random"): {"keys12": 2}}
    results = results_of(settings, answers, {})
    assert retained_accuracy(results, FREE, "keys12").remark == "no better than random, 0.20"
    del answers[Arm("dense", "random")]
    assert retained_accuracy(results_of(settings, answers, {}), FREE, "keys12").remark == (
        "random is not judged yet"
    )


def test_controls_that_see_fewer_tokens_are_said_to(settings):
    fine = settings.variants["fine"]
    wide = replace(fine, attention=replace(fine.attention, topk=12))
    more = replace(settings, variants={"fine": fine, "wide": wide})
    answers = {DENSE: 10, FINE: 9, Arm("wide", "wide"): 9, WINDOW: 1, RANDOM: 1}
    results = results_of(more, {arm: {"keys12": right} for arm, right in answers.items()}, {})
    assert retained_accuracy(results, FINE, "keys12").remark == ""
    assert retained_accuracy(results, Arm("wide", "wide"), "keys12").remark == (
        "the controls see fewer tokens, 64: compare by control=wide"
    )


def test_no_empty_table_stands_where_dense_can_do_nothing(settings):
    answers = {arm: dict.fromkeys(("keys12", "keys200", "single"), 1) for arm in (DENSE, FINE)}
    text = report(results_of(settings, answers, {}))
    assert "Accuracy over that of the dense model" not in text
    assert text.count("variant") == 1  # the table of answers
    assert text.endswith("Left out, since dense answers less than half: keys12, keys200, single")


def test_the_mean_of_ruler_leaves_out_what_dense_cannot_do(settings):
    answers = {DENSE: (10, 8, 4), FINE: (9, 8, 4), WINDOW: (1, 2, 4)}
    names = ("niah_single_1@256", "ruler_vt@256", "ruler_cwe@256")
    found = {
        (arm, seed, "ruler"): {"tasks": {n: rows(r) for n, r in zip(names, right, strict=True)}}
        for arm, right in answers.items()
        for seed in settings.run.seeds
    }
    results = Results(settings, found)
    assert mean_of_ruler(results, FINE) == pytest.approx((0.95, 0.95, 0.95), abs=0.006)
    assert mean_of_ruler(results, WINDOW) == pytest.approx((0.175, 0.175, 0.175), abs=0.006)
    assert mean_of_ruler(results, DENSE) is None
    assert mean_of_ruler(results, FREE) is None  # not judged
    text = report(results)
    assert "mean of RULER" in text
    assert "0.950 [0.944 0.956]" in text
    assert "mean of RULER" not in report(results_of(settings, {DENSE: {"keys12": 9}}, {}))


def test_a_generated_program_is_right_where_all_its_lines_are(settings):
    lines = {DENSE: [[1, 1], [1, 1]], FINE: [[1, 1], [1, 0]]}
    found = {
        (arm, seed, "generation"): {"hits": hits}
        for arm, hits in lines.items()
        for seed in settings.run.seeds
    }
    results = Results(settings, found)
    assert results.accuracy("steps_generated", FINE) == 0.75
    assert results.accuracy("steps_generated_whole", FINE) == 0.5
    assert retained_accuracy(results, FINE, "steps_generated_whole").share.value == 0.5


def test_the_gap_is_between_models_of_the_same_training(settings):
    nats = {DENSE: 1.0, WINDOW: 1.2, FINE: 1.05, FREE: 1.1, Arm("dense", "window"): 1.4}
    results = results_of(settings, {}, nats)
    assert closed_gap(results, FINE).value == pytest.approx(0.75)
    assert closed_gap(results, FREE).value == pytest.approx(0.75)
    assert closed_gap(results, DENSE) is None


@pytest.mark.parametrize("window", [0.9, 1.0])
def test_no_gap_is_closed_where_dense_predicts_no_better_than_the_window(settings, window):
    results = results_of(settings, {}, {DENSE: 1.0, WINDOW: window, FINE: 0.99})
    assert closed_gap(results, FINE) is None
    text = report(results)
    assert text.endswith("No gap, since the interval of window - dense reaches 0: fine")
    assert "[" not in text


def test_questions_of_a_model_as_it_is_are_those_of_one_seed(settings):
    answers = {DENSE: {"keys12": 10}, FREE: {"keys12": 9}}
    assert [len(hits) for hits in results_of(settings, answers, {}).hits("keys12", FREE)] == [2]
    as_it_is = replace(settings, tuning=None, judge=replace(settings.judge, length=settings.length))
    (hits,) = results_of(as_it_is, answers, {}).hits("keys12", FREE)
    assert hits.tolist() == [[9] * 40]


def test_tables_say_which_models_have_one_seed(settings):
    answers = {DENSE: {"keys12": 10}, FINE: {"keys12": 9}, FREE: {"keys12": 9}}
    results = results_of(settings, answers, {})
    assert "Of one seed" not in report(results)
    del results.found[FREE, 1, "retrieval"]
    note = "Of one seed, without the variance between trainings: dense->fine"
    assert note in report(results).splitlines()


def test_tables_and_plot_hold_what_is_done_and_no_more(settings, tmp_path):
    answers = {
        DENSE: {"keys12": 10, "keys200": 4, "single": 10},
        FINE: {"keys12": 9, "keys200": 1, "single": 9},
        WINDOW: {"keys12": 1, "keys200": 1, "single": 9},
        RANDOM: {"keys12": 1, "keys200": 1, "single": 1},
    }
    results = results_of(settings, answers, {DENSE: 1.0, WINDOW: 1.2, FINE: 1.05})
    text = report(results)
    (line,) = [line for line in text.splitlines() if "(1)" in line and line.startswith("fine")]
    assert line.split() == [*("fine", "12.5%", "0.900", "[0.893", "0.907]"), *line.split()[5:]]
    assert line.endswith("0.900 [0.893 0.907] (1)")
    assert "(1) no evidence: window keeps 0.90" in text
    assert "Left out, since dense answers less than half: keys200" in text
    assert "0.750 [0.750 0.750]" in text  # of the gap
    write_table(results, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * (4 * 3 + 3 * 4)
    (row,) = [
        row
        for row in table
        if (row["variant"], row["task"], row["seed"]) == ("fine", "keys12", "1")
    ]
    assert (row["items"], row["hits"], row["value"]) == ("200", "180", "0.9000")
    assert row["hits_by_depth"].split() == ["20/20"] * 9 + ["0/20"]
    assert (row["commit"], row["device"], row["visible"]) == ("abc", "card", "64")
    plot_quality(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert report(Results(settings, {})) == "no results yet"
