from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from infllm_flex.training.data import WindowSampler
from tests.checkout import ROOT
from tests.training.runs import interrupted, write_texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    # Models this small lose more time to waking threads than they gain.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Send Ctrl-C, or another signal, while a step fetches its text."""

    def arrange(step: int, number: int = signal.SIGINT) -> None:
        monkeypatch.setattr(WindowSampler, "batch", interrupted(WindowSampler.batch, step, number))

    return arrange


@pytest.fixture
def finetune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; returns its status, standard output and standard error."""
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "scripts" / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.showwarning", None)  # the command sets its own
            status = module.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
