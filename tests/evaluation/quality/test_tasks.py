"""Answers are at their spans and follow from the facts; held-out names are not trained on."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch

from evaluation.quality.base import beginning
from evaluation.quality.generation import of_equal_length
from evaluation.quality.mixture import MixtureSampler
from evaluation.quality.names import STEPS, TASKS
from evaluation.quality.settings import TuningSettings
from evaluation.quality.tasks import TaskMaker
from evaluation.quality.words import Vocabulary
from tests.evaluation.quality.tiny import make_spaced_tokenizer, make_tokenizer

LENGTH = 2048
ASKED = re.compile(r"Question: What (?:is|are) the ([a-z ]+?)s? of the ([a-z ]+?)(?:, in order)?\?")


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(make_tokenizer())


@pytest.fixture(scope="module")
def text(vocabulary):
    return torch.tensor(vocabulary.encode(" " * 3)).repeat(3000)


def make(vocabulary, text, task, seed=0, held_out=True, length=LENGTH):
    return TaskMaker(vocabulary, text, length, held_out, 12).row(task, Random(seed))


def solve(facts: list[str], form: str, name: str) -> str:
    """Find the answer by parsing the facts in the text."""
    values = []
    for fact in facts:
        if found := re.fullmatch(rf"\n(?:The|One) {form} of the {name} is (\d+)\.\n", fact):
            values.append(found[1])
        elif found := re.fullmatch(rf"\nThe {name} has the same {form} as the ([a-z ]+)\.\n", fact):
            values.append(solve(facts, form, found[1]))
    return " ".join(values)


def test_facts_have_no_second_space_where_a_tokenizer_begins_texts_with_one():
    spaced = Vocabulary(make_spaced_tokenizer())
    filler = torch.tensor(spaced.encode(".")).repeat(3000)
    row = make(spaced, filler, "keys12")
    whole = spaced.decode(row.tokens.tolist())
    asked = re.findall(
        r"\nQuestion: What is the secret code of the( \w+ \w+)\?\nAnswer: (\d{6})", whole
    )
    assert len(asked) == 12
    for name, value in asked:
        assert f"\nThe secret code of the{name} is {value}.\n" in whole


def test_every_sequence_begins_as_the_tokenizer_begins_it():
    tokenizer = make_spaced_tokenizer()
    assert beginning(make_tokenizer()) == []
    begin = beginning(tokenizer)
    assert begin == [tokenizer.bos_token_id]
    spaced = Vocabulary(tokenizer, begin)
    filler = torch.tensor(spaced.encode(".")).repeat(3000)
    rows = [make(spaced, filler, STEPS, seed) for seed in range(4)]
    tuning = TuningSettings(length=LENGTH, batch_size=1, steps=1, learning_rate=1.0, warmup_steps=0)
    trained = MixtureSampler(filler, spaced, tuning, LENGTH, 0).batch(range(8)).input_ids
    prompts = of_equal_length(rows, len(begin))
    for some in (torch.stack([row.tokens for row in rows]), trained, prompts):
        assert ((some == begin[0]) == (torch.arange(some.shape[1]) == 0)).all()
    assert trained.shape == (8, LENGTH)
    assert {len(row.tokens) for row in rows} == {LENGTH}
    row = rows[0]
    for question in row.questions:
        line = spaced.decode(row.tokens[question.answer.start : question.answer.end].tolist())
        assert re.fullmatch(r"\nStep \d+: \w+ =( \w+ =)? \d{3}", line)


def test_prompts_of_generation_are_as_long_and_lose_no_fact(vocabulary, text):
    rows = [make(vocabulary, text, STEPS, seed) for seed in range(12)]
    ends = [row.questions[0].answer.start for row in rows]
    prompts = of_equal_length(rows, 0)
    assert prompts.shape[1] == min(ends)
    assert any(
        min(question.needles[0].start for question in row.questions) < end - min(ends)
        for row, end in zip(rows, ends, strict=True)
    )  # else cutting the beginning would do, too
    for row, prompt in zip(rows, prompts, strict=True):
        whole = vocabulary.decode(prompt.tolist())
        for question in row.questions:
            span = question.needles[0]
            assert vocabulary.decode(row.tokens[span.start : span.end].tolist()) in whole
        assert whole.endswith("\nQuestion: Run all steps in order.\nAnswer:")


@pytest.mark.parametrize("task", [task for task in TASKS if task != STEPS])
def test_every_answer_follows_from_its_needles_and_from_no_other_fact(vocabulary, text, task):
    row = make(vocabulary, text, task)
    assert len(row.tokens) == LENGTH
    decode = vocabulary.decode
    facts = [
        decode(row.tokens[span.start : span.end].tolist())
        for span in sorted({span for question in row.questions for span in question.needles})
    ]
    everything = re.findall(
        r"\n(?:The|One) [a-z ]+ (?:is|has) [a-z0-9 ]+\.\n", decode(row.tokens.tolist())
    )
    end = 0
    for question in row.questions:
        before = decode(row.tokens[end : question.answer.start].tolist())
        form, name = ASKED.search(before).groups()
        answer = decode(row.tokens[question.answer.start : question.answer.end].tolist())
        needles = [decode(row.tokens[s.start : s.end].tolist()) for s in question.needles]
        assert answer == " " + solve(needles, form, name)
        assert solve(everything, form, name) == solve(needles, form, name)
        assert all(needle in facts for needle in needles)
        end = question.answer.end
    assert end == LENGTH
    assert len(row.questions) >= 6


def test_lines_of_a_program_follow_from_their_line_and_from_lines_before(vocabulary, text):
    row = make(vocabulary, text, STEPS)
    decode, state = vocabulary.decode, {}
    for number, question in enumerate(row.questions, start=1):
        (needle,) = question.needles
        fact = decode(row.tokens[needle.start : needle.end].tolist())
        name, source = re.fullmatch(rf"\nStep {number}: set (\w+) to (\w+)\.\n", fact).groups()
        state[name] = state.get(source, source)
        assert state[name].isdigit()
        shown = f"{name} = {source} = {state[name]}" if source in state else f"{name} = {source}"
        answer = decode(row.tokens[question.answer.start : question.answer.end].tolist())
        assert answer == f"\nStep {number}: {shown}"
    assert len(row.questions) == 48
    assert row.questions[-1].answer.end - row.questions[0].answer.start >= 500


def test_rows_are_a_function_of_the_seed(vocabulary, text):
    one, same = (make(vocabulary, text, "keys12", seed=3) for _ in range(2))
    assert torch.equal(one.tokens, same.tokens)
    assert one.questions == same.questions
    assert not torch.equal(one.tokens, make(vocabulary, text, "keys12", seed=4).tokens)


def test_names_and_values_of_the_evaluation_are_never_trained_on(vocabulary):
    random = Random(0)
    shown, asked = (
        {
            word
            for n in range(50)
            for name in vocabulary.names(random, part, 8, 2)
            for word in name.split()
        }
        for part in (False, True)
    )
    assert len(shown) > 100
    assert len(asked) > 30
    assert not shown & asked
    values = [{vocabulary.value(random, part) for _ in range(300)} for part in (False, True)]
    assert not values[0] & values[1]


def test_depths_are_spread_over_the_text(vocabulary, text):
    rows = [make(vocabulary, text, "keys12", seed=seed) for seed in range(20)]
    depths = [row.depth(question) for row in rows for question in row.questions]
    assert set(depths) >= set(range(7))  # questions fill the last tenths
    for row in rows:
        for question in row.questions:
            start = question.needles[0].start
            assert row.depth(question) / 10 <= start / LENGTH < (row.depth(question) + 1) / 10


def test_a_sequence_too_short_says_so(vocabulary, text):
    with pytest.raises(ValueError, match="a sequence of 60 tokens is too short for 1 facts"):
        make(vocabulary, text, "keys12", length=60)


def test_samples_weigh_answers_and_depend_on_their_number_alone(vocabulary, text):
    tuning = TuningSettings(length=LENGTH, batch_size=2, steps=99, learning_rate=1e-3, emphasis=2.0)
    sampler = MixtureSampler(text, vocabulary, tuning, LENGTH, seed=5)
    together = sampler.batch(range(12))
    for number in (7, 2):
        alone = sampler.batch([number])
        assert torch.equal(alone.input_ids[0], together.input_ids[number])
        assert torch.equal(alone.weights[0], together.weights[number])
    assert torch.equal(together.input_ids[:, 1:], together.labels[:, :-1])
    plain = [bool((row == 1).all()) for row in together.weights]
    assert 1 <= sum(plain) <= 11
    for row, is_plain in zip(together.weights, plain, strict=True):
        # All tokens count 1 on average, and answers, where there are some, 2 more on average.
        assert abs(float(row.mean()) - (1.0 if is_plain else 3.0)) < 1e-3
