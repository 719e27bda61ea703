import subprocess
import sys

from benchmarking import results
from benchmarking.checkout import ROOT, environment


def test_every_folder_whose_changes_mark_a_row_is_in_the_repository():
    assert (ROOT / "pyproject.toml").is_file()
    assert all((ROOT / folder).is_dir() for folder in results._MEASURED)


def test_changes_of_measured_code_mark_the_commit(monkeypatch):
    status = {"rev-parse": "1234567890\n", "status": ""}
    asked = []
    monkeypatch.setattr(results, "_git", lambda *args: asked.append(args) or status[args[0]])
    assert results._commit() == "1234567890"
    status["status"] = " M custom_ops/a.py\n"
    assert results._commit() == "1234567890+changes"
    assert asked[-1][-4:] == results._MEASURED


def test_processes_that_measure_import_the_code_of_this_checkout(tmp_path, monkeypatch):
    (tmp_path / "infllm_flex").mkdir()
    (tmp_path / "infllm_flex" / "__init__.py").write_text("raise AssertionError('other code')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, "-c", "import infllm_flex.process_memory as m; print(m.__file__)"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "infllm_flex" / "process_memory.py"), done.stderr
