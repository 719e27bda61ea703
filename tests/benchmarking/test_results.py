import shutil
import subprocess
import sys

import pytest

from benchmarking import environment, results
from benchmarking.checkout import ROOT, python_environment


def test_every_folder_whose_changes_mark_a_row_is_in_the_repository():
    assert (ROOT / "pyproject.toml").is_file()
    assert all((ROOT / folder).is_dir() for folder in environment._MEASURED)


def test_changes_of_measured_code_mark_the_commit(monkeypatch):
    status = {"rev-parse": "1234567890\n", "status": ""}
    asked = []
    monkeypatch.setattr(environment, "_git", lambda *args: asked.append(args) or status[args[0]])
    assert environment._commit() == "1234567890"
    status["status"] = " M custom_ops/a.py\n"
    assert environment._commit() == "1234567890+changes"
    assert asked[-1][-4:] == environment._MEASURED


def test_processes_that_measure_import_the_code_of_this_checkout(tmp_path, monkeypatch):
    (tmp_path / "infllm_flex").mkdir()
    (tmp_path / "infllm_flex" / "__init__.py").write_text("raise AssertionError('other code')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, "-c", "import infllm_flex.process_memory as m; print(m.__file__)"]
    done = subprocess.run(
        command, cwd=ROOT, env=python_environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == str(ROOT / "infllm_flex" / "process_memory.py"), done.stderr


def test_a_csv_whose_last_line_is_cut_gets_no_rows(tmp_path):
    path = tmp_path / "rows.csv"
    with results.CsvFile(path, ("op", "ms"), {}) as file:
        file.add(op="attend", ms=1.5)
    results.CsvFile(path, ("op", "ms"), {}).__exit__(None, None, None)
    whole = path.read_text()
    path.write_text(whole + "select,0.")
    with pytest.raises(ValueError, match=r"rows\.csv: its last line is cut"):
        results.CsvFile(path, ("op", "ms"), {})
    assert path.read_text() == whole + "select,0."


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("plot", ["bench_cpu.csv"]),
        ("plot_quality_time", ["quality_smollm2_8k.csv", "bench_granularity.csv"]),
    ],
)
def test_without_matplotlib_a_plot_says_how_to_install_it(script, names, tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.modules['matplotlib'] = None\n"
        f"sys.argv = [{script!r}, *sys.argv[1:]]\n"
        f"runpy.run_path({str(ROOT / 'scripts' / script)!r} + '.py', run_name='__main__')\n"
    )
    paths = [str(shutil.copy(ROOT / "docs/results" / name, tmp_path)) for name in names]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths],
        env=python_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "no plot: pip install '.[plot]'\n")
