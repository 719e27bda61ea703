"""Command lines: where settings may stand, and what a wrong one is answered."""

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.checkout import ROOT

TAKES_SETTINGS = re.compile(r'nargs="\*", metavar="\w+\.key=value"')
SCRIPTS = [
    path
    for path in sorted((ROOT / "scripts").glob("*.py"))
    if TAKES_SETTINGS.search(path.read_text())
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_that_takes_settings_takes_them_among_its_options(path):
    """`parse_args` takes all of them from one place, and calls the others unrecognized."""
    text = path.read_text()
    assert "parse_intermixed_args(" in text
    assert not re.search(r"\bparse_args\(", text)


def test_settings_before_and_after_an_option_count():
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "run.threads=3"]
    command += ["--config", ROOT / "configs" / "bench_cpu.yaml", "run.seed=7", "--print-config"]
    done = subprocess.run([*command, "run.rounds=9"], capture_output=True, text=True, check=True)
    for line in ("threads: 3", "seed: 7", "rounds: 9"):
        assert f"  {line}\n" in done.stdout


@pytest.mark.parametrize("name", ["benchmark", "benchmark_models"])
def test_settings_for_a_gpu_are_shown_without_one(name):
    config = {"benchmark": "bench_h200.yaml", "benchmark_models": "bench_models.yaml"}[name]
    command = [sys.executable, ROOT / "scripts" / f"{name}.py", "--print-config"]
    command += ["--config", ROOT / "configs" / config, "run.warmup=8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "device: cuda\n" in done.stdout
    assert "warmup: 8\n" in done.stdout


def test_what_names_its_interpreter_can_be_run():
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    named = [path for path in scripts if path.read_text().startswith("#!")]
    assert len(named) > 10
    assert [path.name for path in named if not os.access(path, os.X_OK)] == []


def test_every_command_ends_as_usual_where_nobody_reads_its_output():
    commands = [path for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text()]
    assert len(commands) > 10
    end = "sys.exit(run_command(main))\n"
    assert [path.name for path in commands if not path.read_text().endswith(end)] == []


# Options that a command cannot do without, beside --config.
NEEDED = {
    "compare_scores.py": ["--table", "unused.csv"],
    "compare_selection_loss.py": ["--table", "unused.csv"],
}


@pytest.mark.parametrize(
    "path",
    [path for path in SCRIPTS if '"--config"' in path.read_text()],
    ids=lambda path: path.name,
)
@pytest.mark.parametrize("wrong", ["config", "setting"])
def test_a_wrong_file_or_setting_is_one_line_and_status_2(
    path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = re.search(r"configs/\w+\.yaml", path.read_text())
    assert config is not None  # its own text names one
    arguments, named = {
        "config": (["--config", "missing.yaml"], "missing.yaml: no such file"),
        "setting": (["--config", config[0], "no_such.key=1"], "no_such: unknown key"),
    }[wrong]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(path), *NEEDED.get(path.name, []), *arguments])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # commands replace it
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert named in said
    assert len(said.splitlines()) == 1
