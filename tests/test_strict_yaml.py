"""A config file is read exactly, or refused with every mistake, file and line."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import infllm_flex as ifx
from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml, to_yaml


@dataclass(frozen=True)
class Optim:
    learning_rate: float = 1e-3
    steps: int = 10
    kind: Literal["adamw", "sgd"] = "adamw"
    fused: bool = False
    betas: tuple[float, ...] = (0.9, 0.95)

    def __post_init__(self) -> None:
        problems = []
        if self.learning_rate <= 0:
            problems.append(f"learning_rate must be positive, got {self.learning_rate}")
        if self.steps < 1:
            problems.append(f"steps must be at least 1, got {self.steps}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path = Path("runs")
    limit: int | None = None
    optim: Optim = field(default_factory=Optim)
    stages: dict[str, Optim] = field(default_factory=dict)


@pytest.fixture
def build(tmp_path):
    def from_text(text, *overrides, cls=Run):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return build_dataclass(cls, load_yaml(path, overrides))

    return from_text


@pytest.fixture
def complaints(build, tmp_path):
    def of(text, *overrides, cls=Run):
        with pytest.raises(ConfigError) as caught:
            build(text, *overrides, cls=cls)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return of


def test_values_take_the_type_of_their_setting(build):
    run = build(
        "name: demo\nfolder: a/b\nlimit: 7\n"
        "optim: {learning_rate: 2e-5, steps: 1_000, kind: sgd, fused: on, betas: [0.8, 1]}\n"
        "stages:\n  short: {steps: 3}\n  long:\n"
    )
    assert run.name == "demo"
    assert run.folder == Path("a/b")
    assert run.limit == 7
    assert run.optim == Optim(2e-5, 1000, "sgd", True, (0.8, 1.0))
    assert list(run.stages.items()) == [("short", Optim(steps=3)), ("long", Optim())]


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-5", "0.00002", "+2e-05"])
def test_every_spelling_of_a_number_is_a_number(build, text):
    assert build(f"name: a\noptim: {{learning_rate: {text}}}").optim.learning_rate == 2e-5


def test_an_optional_setting_may_be_left_blank(build):
    assert build("name: a\nlimit:\n").limit is None
    assert build("name: a\nlimit: null\n").limit is None


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("steps: 1.5", "expected an integer, got 1.5"),
        ("steps: many", "expected an integer, got many"),
        ("steps: '5'", "expected an integer, got the text '5'"),
        ("steps: 010", "expected an integer, got 010"),
        ("steps: 1:30", "expected an integer, got 1:30"),
        ("steps: true", "expected an integer, got true"),
        ("steps:", "expected an integer, got nothing"),
        ("steps: [1]", "expected an integer, got a list"),
        ("steps: {a: 1}", "expected an integer, got a section"),
        ("steps: 99999999999999999999", "expected an integer of at most 9223372036854775807, "),
        ("learning_rate: high", "expected a number, got high"),
        ("learning_rate: .nan", "expected a number, got .nan"),
        ("learning_rate: 1e999", "expected a finite number, got 1e999"),
        ("learning_rate: '1'", "expected a number, got the text '1'"),
        ("fused: 1", "expected true or false, got 1"),
        ("fused: 'no'", "expected true or false, got the text 'no'"),
        ("kind: adam", "expected one of adamw, sgd, got adam"),
        ("betas: 0.9", "expected a list, got 0.9"),
        ("learning_rate: -1", "must be positive, got -1.0"),
    ],
)
def test_a_wrong_value_is_reported_with_its_line(complaints, line, complaint):
    (said,) = complaints(f"name: a\noptim:\n  {line}\n")
    key = line.partition(":")[0]
    assert said.startswith(f"x.yaml:3: optim.{key}: {complaint}")


def test_text_that_yaml_reads_as_another_type_must_be_quoted(build, complaints):
    assert complaints("name: no") == ["x.yaml:1: name: expected text, got no (put it in quotes)"]
    assert build("name: 'no'").name == "no"


def test_an_unknown_key_is_reported_with_the_nearest_one(complaints):
    assert complaints("name: a\noptim:\n  lerning_rate: 1\n") == [
        "x.yaml:3: optim.lerning_rate: unknown key (did you mean learning_rate?)"
    ]
    assert complaints("name: a\nzzz: 1\n") == [
        "x.yaml:2: zzz: unknown key (known: name, folder, limit, optim, stages)"
    ]


def test_all_mistakes_are_reported_at_once(complaints):
    said = complaints(
        "folder: [a]\nlimit: few\noptim:\n  lerning_rate: 1\n  steps: 0\n  kind: 3\n"
        "  learning_rate: -2\nstages: {long: {steps: x}}\n"
    )
    assert sorted(said) == [
        "x.yaml:1: folder: expected a path, got a list",
        "x.yaml:1: name: is missing and has no default",
        "x.yaml:2: limit: expected an integer, got few",
        "x.yaml:4: optim.lerning_rate: unknown key (did you mean learning_rate?)",
        "x.yaml:5: optim.steps: must be at least 1, got 0",
        "x.yaml:6: optim.kind: expected one of adamw, sgd, got 3",
        "x.yaml:7: optim.learning_rate: must be positive, got -2.0",
        "x.yaml:8: stages.long.steps: expected an integer, got x",
    ]


def test_checks_that_stop_at_the_first_mistake_are_repeated(complaints):
    said = complaints("topk: 0\nblock_size: 24\nwindow_size: 100\n", cls=ifx.InfLLMConfig)
    assert [line.split(" must")[0] for line in said] == ["x.yaml:1: topk:", "x.yaml:2: block_size:"]


def test_a_conflict_with_a_default_is_reported_at_the_written_line(complaints):
    (said,) = complaints("lse: exact\ninit_blocks: 100\n", cls=ifx.InfLLMConfig)
    assert said.startswith("x.yaml:2: topk must be at least init_blocks + 1 = 101")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "x.yaml: is empty, expected a mapping of settings"),
        ("# only a comment\n", "x.yaml: is empty, expected a mapping of settings"),
        ("- a\n- b\n", "x.yaml:1: expected a mapping of settings at the top, got a list"),
        ("\njust text\n", "x.yaml:2: expected a mapping of settings at the top, got 'just text'"),
        ("a: 1\nb: [1\n", "x.yaml:3: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n\tb: 2\n", "x.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("a: \x07\n", "x.yaml: not YAML: unacceptable character #x0007"),
        ("name: a\nname: b\n", "x.yaml:2: name: duplicate key, first in line 1"),
        ("name: !!python/name:os.system x\n", "x.yaml:1: name: the tag tag:yaml.org,2002:python/"),
        ("? [a]\n: 1\n", "x.yaml:1: the key of a setting must be text"),
        ("name: *gone\n", "x.yaml:1: not YAML: found undefined alias 'gone'"),
        ("name: &a [*a]\n", "x.yaml:1: name"),
        ("[" * 5000, "x.yaml: is nested too deeply"),
    ],
)
def test_a_file_without_settings_is_refused_in_one_line(complaints, content, complaint):
    (said,) = complaints(content)
    assert said.startswith(complaint)


def test_a_missing_file_a_directory_and_binary_data_are_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^.*gone\.yaml: no such file$"):
        load_yaml(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match=r": is a directory, expected a YAML file$"):
        load_yaml(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_yaml(tmp_path / "model.bin")


def test_a_small_file_cannot_grow_large_through_aliases_or_size(tmp_path):
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    (tmp_path / "x.yaml").write_text(laughs)
    with pytest.raises(ConfigError, match="more than 10000 values"):
        load_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("#" * 1_000_001)
    with pytest.raises(ConfigError, match="larger than 1000000 bytes"):
        load_yaml(tmp_path / "x.yaml")


def test_an_override_sets_what_the_file_would(build):
    run = build("name: a\n", "optim.learning_rate=2e-5", "stages.long.steps=4", "limit=", "name=b")
    assert run == Run("b", optim=Optim(2e-5), stages={"long": Optim(steps=4)})


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("optim.lerning_rate=1", "optim.lerning_rate: unknown key (did you mean learning_rate?)"),
        ("optim.steps=x", "optim.steps: expected an integer, got x"),
        ("name.first=x", "name.first: name is a, not a section"),
        ("steps", "expected key=value or section.key=value"),
        ("optim..steps=1", "expected key=value or section.key=value"),
        (
            "optim.steps=[1",
            "optim.steps: '[1' is not a YAML value; as text: 'optim.steps=\"[1\"'",
        ),
        ("name=*.txt", "name: '*.txt' is not a YAML value; as text: 'name=\"*.txt\"'"),
        ("name='x", 'name: "\'x" is not a YAML value'),
        ("optim.steps=1_", "optim.steps: expected an integer, got 1_"),
        ("optim.steps=1__0", "optim.steps: expected an integer, got 1__0"),
        ("optim.learning_rate=1_.5", "optim.learning_rate: expected a number, got 1_.5"),
    ],
)
def test_a_wrong_override_is_reported_as_it_was_written(complaints, override, complaint):
    (said,) = complaints("name: a\n", override)
    assert said == f"override {override!r}: {complaint}"


def test_settings_written_as_yaml_are_read_back_equal(build):
    run = Run("no", Path("x y"), 3, Optim(2e-5, fused=True), {"1": Optim(steps=2)})
    assert build(to_yaml(run)) == run


@given(st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!'\"|>\n #?,.0", max_size=40))
def test_any_content_gives_settings_or_a_config_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with contextlib.suppress(ConfigError):
        build_dataclass(Run, load_yaml(path))
