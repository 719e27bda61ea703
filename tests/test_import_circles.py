"""No file of the packages needs, at whatever time, a file that needs it back."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.checkout import ROOT

PACKAGES = {
    "infllm_flex": ROOT,
    "infllm_flex_ops": ROOT / "custom_ops",
    "benchmarking": ROOT / "scripts",
    "evaluation": ROOT / "scripts",
}


def _files() -> dict[str, Path]:
    """The files of the packages by module name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in (folder / package).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that are there for type checkers only."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _statements(child)


def _imported(source: str) -> Iterator[str]:
    """Names that a file imports, at once or inside functions, and modules of its launchers."""
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "packages import by full names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "cuda_launcher":
            yield f"infllm_flex_ops.{ast.literal_eval(node.args[1])}"


def _graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports; a name that is no module is taken from its parent."""

    def resolve(name: str) -> str:
        return name if name in sources else name.rpartition(".")[0]

    graph = {}
    for module, source in sources.items():
        names = {resolve(name) for name in _imported(source)}
        graph[module] = (names & set(sources)) - {module}
    return graph


def _find_circle(sources: dict[str, str]) -> list[str]:
    try:
        TopologicalSorter(_graph(sources)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_circle_of_imports_even_inside_functions():
    sources = {module: path.read_text() for module, path in _files().items()}
    assert len(sources) > 250
    assert not _find_circle(sources)


@pytest.mark.parametrize(
    "back",
    [
        "from infllm_flex_ops import first",
        "import infllm_flex_ops.first",
        "def f():\n    from infllm_flex_ops.first import f",
        'cuda_launcher(op, "first")',
    ],
)
def test_a_circle_is_found(back):
    first = "from infllm_flex_ops.second import name"
    found = _find_circle({"infllm_flex_ops.first": first, "infllm_flex_ops.second": back})
    assert set(found) == {"infllm_flex_ops.first", "infllm_flex_ops.second"}


def test_an_import_for_type_checkers_is_no_circle():
    second = "if TYPE_CHECKING:\n    from infllm_flex_ops.first import name"
    first = "from infllm_flex_ops.second import name"
    assert not _find_circle({"infllm_flex_ops.first": first, "infllm_flex_ops.second": second})


def test_the_shipped_packages_import_nothing_else_of_their_own_by_name():
    by_name = re.compile(r"\b(import_module|__import__)\(")
    shipped = {module: path for module, path in _files().items() if "infllm_flex" in module}
    found = {module for module, path in shipped.items() if by_name.search(path.read_text())}
    libraries = {"infllm_flex.training.memory_estimate"}
    assert found - libraries == {"infllm_flex_ops.dispatch"}  # the launchers, which are followed
