import pytest

from benchmarking.settings import BenchmarkSettings
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from tests.benchmarking.command import script_runner, write_config


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def run_script(monkeypatch, capsys):
    return script_runner(monkeypatch, capsys)


@pytest.fixture
def settings(config):
    return build_dataclass(BenchmarkSettings, load_yaml(config))
