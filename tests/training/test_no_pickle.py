"""No code of the project reads or writes pickles."""

from __future__ import annotations

import ast

from tests.checkout import ROOT


def test_no_code_of_the_packages_reads_or_writes_pickles():
    folders = ("infllm_flex", "custom_ops/infllm_flex_ops", "scripts", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "cloudpickle", "joblib"} & set(modules), source
            if isinstance(node, ast.ImportFrom):
                # The default storage of torch.distributed.checkpoint unpickles its index.
                imported = {alias.name for alias in node.names}
                assert not {"FileSystemReader", "FileSystemWriter"} & imported, source
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {
                    ("torch", "load"),
                    ("torch", "save"),
                    ("yaml", "load"),
                }, source
