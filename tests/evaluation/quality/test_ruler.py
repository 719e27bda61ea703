"""RULER's prompts: as many as are asked, and no more."""

from __future__ import annotations

from random import Random

import pytest
import torch

from evaluation.quality import tuning
from evaluation.quality.arms import attention_modes
from evaluation.quality.ruler import _evaluate, make_prompts, no_sentences
from evaluation.quality.ruler_rows import RulerRows
from evaluation.quality.settings import QualitySettings
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from infllm_flex.training.model import load_model
from tests.evaluation.quality.tiny import make_base, make_tokenizer, settings_of, write_settings


def test_a_task_makes_as_many_prompts_as_are_asked_each_time(tmp_path):
    pytest.importorskip("lm_eval")
    make_tokenizer().save_pretrained(tmp_path)
    for count in (3, 5):  # a process that trains and judges asks for two numbers
        with no_sentences():
            found = make_prompts(("niah_multikey_2", "ruler_fwe"), 6000, str(tmp_path), 0, count)
        assert [len(list(task.test_docs())) for task in found["tasks"].values()] == [count] * 2


def test_training_rows_end_with_answers_to_prompts_that_evaluation_does_not_ask(tmp_path):
    pytest.importorskip("lm_eval")
    tokenizer, task, length = make_tokenizer(), "niah_multikey_2", 6000
    tokenizer.save_pretrained(tmp_path)
    text = torch.tensor(tokenizer(" bada" * length).input_ids)
    rows = [
        RulerRows((task,), text, length, tmp_path, 0, 3).row(task, Random(number))
        for number in (*range(9), 0)
    ]
    assert torch.equal(rows[0].tokens, rows[-1].tokens)
    asked = set()
    for row in rows:
        (question,) = row.questions
        assert len(row.tokens) == question.answer.end == length
        assert not question.needles
        context = tokenizer.decode(row.tokens[: question.answer.start])
        answer = tokenizer.decode(row.tokens[question.answer.start :])
        facts, _, asking = context.rpartition("What is")
        assert answer.startswith(" ")
        assert facts.count(f"is:{answer}.") == 1
        name = asking.split(" for ")[-1].split(" ")[0]
        assert f" for {name} is:{answer}." in facts
        asked.add(name)
    assert 1 < len(asked) <= 3
    with no_sentences():
        judged = make_prompts((task,), length, str(tmp_path), 0, 9)["tasks"][task]
    assert not any(name in doc["gen_prefix"] for doc in judged.test_docs() for name in asked)


def test_a_recipe_without_the_packages_of_its_tasks_says_so_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "missing_packages", lambda: "RULER needs nltk: pip install")
    described = settings_of(tmp_path / "run", make_base(tmp_path / "base"), tmp_path)
    path = write_settings(tmp_path / "config.yaml", described)
    tuning.check_recipes(build_dataclass(QualitySettings, load_yaml(path)))
    described["tuning"]["tasks"] = {"single": 1, "ruler_vt": 1}
    write_settings(path, described)
    with pytest.raises(ValueError, match=r"tuning\.tasks: RULER needs nltk: pip install"):
        tuning.check_recipes(build_dataclass(QualitySettings, load_yaml(path)))


def test_prompts_that_are_continued_together_get_the_answers_they_get_alone(tmp_path):
    """Prompts of unequal length are padded, which must not change what a model attends to."""
    pytest.importorskip("lm_eval")
    length = 6000
    base = make_base(tmp_path / "run" / "base", max_position_embeddings=length)
    network = load_model(base, torch.float32).eval()
    described = settings_of(tmp_path / "run", base, tmp_path)
    described["judge"] |= {"ruler_tasks": ["niah_multikey_2"], "ruler_items": 3}
    answers = []
    write_settings(tmp_path / "config.yaml", described)
    settings = build_dataclass(QualitySettings, load_yaml(tmp_path / "config.yaml"))
    for batch in (1, 3):
        with attention_modes(settings)["fine"].on(network), no_sentences():
            (some,) = _evaluate(settings, network, base, length, 0, batch).values()
        answers.append([sample["resps"] for sample in some])
        lengths = {len(sample["arguments"][0][0]) for sample in some}
    assert len(lengths) > 1
    assert answers[0] == answers[1]
