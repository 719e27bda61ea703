"""The tasks: facts that are hidden in a text, and questions at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from torch import Tensor

from evaluation.quality.names import STEPS
from evaluation.quality.rows import QuestionTokens, Row, compose
from evaluation.quality.settings import QualitySettings
from evaluation.quality.words import Vocabulary

_TOKENS_PER_FACT = 64  # at least, hence shorter sequences have fewer facts
_FORMS = (
    *("secret code", "phone number", "room number"),
    *("badge number", "order number", "locker number"),
)
_CODE = _FORMS[0]
_CHAINS = 12
_VALUES = 3
_LINES = 48
_TOKENS_PER_LINE = 40
_LINE_DIGITS = 3


@dataclass(frozen=True)
class TaskMaker:
    """Makes the sequences of all tasks.

    Args:
        vocabulary: Words and values of the facts.
        text: Tokens ``[N]`` in which facts are hidden.
        length: Tokens of a sequence.
        held_out: Whether names and values are those of evaluation.
        questions: Largest number of questions of a sequence.
    """

    vocabulary: Vocabulary
    text: Tensor
    length: int
    held_out: bool
    questions: int

    def row(self, task: str, random: Random) -> Row:
        """Make a sequence of a task, a function of the state of ``random``."""
        facts, asked = _TASKS[task](self, random)
        beginning = self.vocabulary.beginning
        return compose(random, self.text, self.length, facts, asked, beginning)

    def _fit(self, count: int, facts_each: int = 1) -> int:
        return max(1, min(count, self.length // (_TOKENS_PER_FACT * facts_each)))

    def _names(self, random: Random, count: int, size: int) -> list[str]:
        return self.vocabulary.names(random, self.held_out, count, size)

    def _value(self, random: Random) -> str:
        return self.vocabulary.value(random, self.held_out)

    def _ask(self, form: str, name: str, answer: str, facts: tuple[int, ...]) -> QuestionTokens:
        encode = self.vocabulary.encode
        prompt = [
            *encode.fixed(f"\nQuestion: What is the {form} of the"),
            *encode(name),
            *encode.fixed("?\nAnswer:"),
        ]
        return QuestionTokens(prompt, encode(f" {answer}"), facts)

    def _fact(self, start: str, name: str, middle: str, end: str) -> list[int]:
        encode = self.vocabulary.encode
        return [
            *encode.fixed(start),
            *encode(name),
            *encode.fixed(middle),
            *encode(f" {end}" if end.isdigit() else end),
            *encode.fixed(".\n"),
        ]


def evaluation_maker(
    settings: QualitySettings, vocabulary: Vocabulary, held_out: Tensor
) -> TaskMaker:
    """Return the maker of the sequences of evaluation, from held-out text and names."""
    return TaskMaker(vocabulary, held_out, settings.length + 1, True, settings.questions)


FactsAndQuestions = tuple[list[list[int]], list[QuestionTokens]]


def _single(maker: TaskMaker, random: Random) -> FactsAndQuestions:
    """One fact of each form, so that no two facts look similar."""
    forms = _FORMS[: maker._fit(len(_FORMS))]
    names = maker._names(random, len(forms), 2)
    values = [maker._value(random) for _ in forms]
    facts, asked = [], []
    for number, (form, name, value) in enumerate(zip(forms, names, values, strict=True)):
        facts.append(maker._fact(f"\nThe {form} of the", name, " is", value))
        asked.append(maker._ask(form, name, value, (number,)))
    return _shuffled(random, facts, asked[: maker.questions])


def _keys(count: int, size: int) -> Callable[[TaskMaker, Random], FactsAndQuestions]:
    """Facts of equal form, each with a name of ``size`` words."""

    def make(maker: TaskMaker, random: Random) -> FactsAndQuestions:
        names = maker._names(random, maker._fit(count), size)
        values = [maker._value(random) for _ in names]
        facts = [
            maker._fact(f"\nThe {_CODE} of the", name, " is", value)
            for name, value in zip(names, values, strict=True)
        ]
        chosen = random.sample(range(len(names)), min(maker.questions, len(names)))
        asked = [maker._ask(_CODE, names[n], values[n], (n,)) for n in chosen]
        return _shuffled(random, facts, asked)

    return make


def _values(maker: TaskMaker, random: Random) -> FactsAndQuestions:
    """Several facts for each name; the answer is all values of a name in the order of the text."""
    encode = maker.vocabulary.encode
    names = maker._names(random, maker._fit(16, _VALUES), 2)
    owners = [name for name in names for _ in range(_VALUES)]
    random.shuffle(owners)
    values = [maker._value(random) for _ in owners]
    facts = [
        maker._fact(f"\nOne {_CODE} of the", name, " is", value)
        for name, value in zip(owners, values, strict=True)
    ]
    asked = []
    for name in random.sample(names, min(max(1, maker.questions // 2), len(names))):
        mine = [number for number, owner in enumerate(owners) if owner == name]
        prompt = [
            *encode.fixed(f"\nQuestion: What are the {_CODE}s of the"),
            *encode(name),
            *encode.fixed(", in order?\nAnswer:"),
        ]
        answer = [token for number in mine for token in encode(f" {values[number]}")]
        asked.append(QuestionTokens(prompt, answer, tuple(mine)))
    return facts, asked


def _chain(hops: int) -> Callable[[TaskMaker, Random], FactsAndQuestions]:
    """Chains of names, each with the code of the one before; the last name's code is asked for."""

    def make(maker: TaskMaker, random: Random) -> FactsAndQuestions:
        chains = maker._fit(_CHAINS, hops + 1)
        names = maker._names(random, chains * (hops + 1), 2)
        owners = [chain for chain in range(chains) for _ in range(hops + 1)]
        random.shuffle(owners)
        values = [maker._value(random) for _ in range(chains)]
        facts: list[list[int]] = []
        path: list[list[int]] = [[] for _ in range(chains)]
        for number, chain in enumerate(owners):
            mine = names[chain * (hops + 1) :]
            step = len(path[chain])
            if step == 0:
                fact = maker._fact(f"\nThe {_CODE} of the", mine[0], " is", values[chain])
            else:
                fact = maker._fact(
                    "\nThe", mine[step], f" has the same {_CODE} as the", mine[step - 1]
                )
            facts.append(fact)
            path[chain].append(number)
        asked = [
            maker._ask(_CODE, names[c * (hops + 1) + hops], values[c], tuple(path[c]))
            for c in random.sample(range(chains), min(maker.questions, chains))
        ]
        return facts, asked

    return make


def _steps(maker: TaskMaker, random: Random) -> FactsAndQuestions:
    """A program whose lines are spread over the text; the answer executes it line by line.

    A line sets a new variable to a number or to an earlier variable. Hence each line of the answer
    depends on its line of the program and on an earlier line of the answer. Names are words of
    training in evaluation, too: answers repeat them, and a small model writes a similar word
    instead of one that it was never trained to write.
    """
    encode, count = maker.vocabulary.encode, max(2, min(_LINES, maker.length // _TOKENS_PER_LINE))
    names = maker.vocabulary.names(random, False, min(count, 48), 1)
    values: list[str] = []
    facts, answers = [], []
    for number, name in enumerate(names, start=1):
        if number <= 4 or random.random() < 0.15:
            value = maker.vocabulary.value(random, maker.held_out, _LINE_DIGITS)
            facts.append(maker._fact(f"\nStep {number}: set", name, " to", value))
            answers.append([*encode.fixed(f"\nStep {number}:"), *encode(f"{name} = {value}")])
        else:
            source = random.randrange(number - 1)
            value = values[source]
            facts.append(maker._fact(f"\nStep {number}: set", name, " to", names[source]))
            line = encode(f"{name} ={names[source]} = {value}")
            answers.append([*encode.fixed(f"\nStep {number}:"), *line])
        values.append(value)
    prompt = encode.fixed("\nQuestion: Run all steps in order.\nAnswer:")
    asked = [
        QuestionTokens(prompt if number == 0 else [], answer, (number,))
        for number, answer in enumerate(answers)
    ]
    return _shuffled(random, facts, asked)


def _shuffled(
    random: Random, facts: list[list[int]], asked: list[QuestionTokens]
) -> FactsAndQuestions:
    order = random.sample(range(len(facts)), len(facts))
    place = {number: new for new, number in enumerate(order)}
    moved = [item._replace(facts=tuple(place[n] for n in item.facts)) for item in asked]
    return [facts[number] for number in order], moved


_TASKS: dict[str, Callable[[TaskMaker, Random], FactsAndQuestions]] = {
    "single": _single,
    "keys12": _keys(12, 2),
    "keys200": _keys(200, 2),
    "values3": _values,
    "key1": _keys(48, 1),
    "key2": _keys(48, 2),
    "key4": _keys(48, 4),
    "chain1": _chain(1),
    "chain2": _chain(2),
    "chain3": _chain(3),
    STEPS: _steps,
}
