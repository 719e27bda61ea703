"""scripts/families.py writes a row per type, also for a failed process, and can be resumed."""

import csv
import importlib.util
import sys
import time
from pathlib import Path

import pytest
import transformers

from tests.patch.families import examine as examining
from tests.patch.families.examine import Verdict
from tests.patch.families.table import format_table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("families_script", ROOT / "scripts/families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CSV", tmp_path / "families.csv")
    monkeypatch.setattr(module, "TABLE", tmp_path / "models.md")
    return module


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["families.py", *arguments])
    status = script.main()
    with script.CSV.open(newline="") as file:
        return status, {row["type"]: row for row in csv.DictReader(file)}


def verdicts(model_type):
    """Replaces the examination: one outcome of each kind."""
    if model_type == "llama":
        return Verdict("sound", sparse=2, layers=2)
    if model_type == "mamba":
        return Verdict("refused", "no attention")
    if model_type == "bloom":
        raise MemoryError("too large")
    if model_type == "opt":
        sys.exit(3)
    time.sleep(60)
    return Verdict("sound")


def test_each_type_has_a_row_whatever_becomes_of_its_process(script, monkeypatch):
    monkeypatch.setattr(examining, "examine", verdicts)
    types = ("llama", "mamba", "bloom", "opt", "gpt2")
    status, rows = run(
        script, monkeypatch, "--types", ",".join(types), "--seconds", "8", "--jobs", "5"
    )
    assert status == 1
    assert sorted(rows) == sorted(types)
    assert (rows["llama"]["result"], rows["llama"]["sparse"]) == ("sound", "2")
    assert (rows["mamba"]["result"], rows["mamba"]["why"]) == ("refused", "no attention")
    assert rows["bloom"]["faults"] == "MemoryError: too large"
    assert rows["opt"]["faults"] == "SystemExit: 3"
    assert rows["gpt2"]["faults"] == "not done after 8 s"
    assert rows["llama"]["transformers"] == transformers.__version__
    assert "1 sound, 1 refused when patching" in script.TABLE.read_text()


def test_it_goes_on_with_what_is_left(script, monkeypatch):
    monkeypatch.setattr(examining, "examine", verdicts)
    monkeypatch.setattr("tests.patch.families.tiny.TYPES", ("llama", "mamba"))
    run(script, monkeypatch, "--types", "llama")
    first = script.CSV.read_text()
    status, rows = run(script, monkeypatch)
    assert status == 0
    assert list(rows) == ["llama", "mamba"]
    assert first.splitlines()[1] in script.CSV.read_text()


def test_unknown_types_are_named(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["families.py", "--types", "llama,lama"])
    assert script.main() == 2
    assert "lama" in capsys.readouterr().err


def test_the_table_escapes_what_would_end_a_cell():
    row = dict.fromkeys(("type", "class", "why", "left", "sparse", "layers", "faults"), "a|b")
    assert "a\\|b" in format_table([{**row, "result": "refused", "transformers": "5"}])
