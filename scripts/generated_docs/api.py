"""docs/api.md: the public names and the operators."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch.library import CustomOpDef  # type: ignore[attr-defined]

import infllm_flex
import infllm_flex_ops
from generated_docs.docstrings import code_block, describe, paragraphs
from generated_docs.signatures import signature_of, wrap_call

_STAGES = ("selection", "block_lists", "block_attention")
_API = """
`import infllm_flex as ifx` gives the names of the first part. Shapes: `B` batch, `Hq` query heads,
`Hkv` key/value heads, `G = Hq / Hkv`, `Sq` and `Skv` tokens of queries and keys, `D` head dim,
`Nkv` blocks of keys, `K` selected blocks.
"""
_OPERATORS = """
The functions above are made of these. Importing `infllm_flex_ops` registers them as
`torch.ops.infllm_flex.NAME`. Each has a definition in plain PyTorch, which runs on the CPU, and
Triton kernels for CUDA.
"""


def api_page() -> str:
    """Describe the public names of ``infllm_flex`` and the operators of ``infllm_flex_ops``."""
    parts = ["# API", *paragraphs(_API), "## infllm_flex"]
    for name in infllm_flex.__all__:
        parts += _describe_object(name, getattr(infllm_flex, name))
    parts += ["## Operators", *paragraphs(_OPERATORS)]
    for stage, operators in _operators().items():
        parts.append(f"### {stage}")
        for name, docstring in sorted(operators.items()):
            schema = str(getattr(torch.ops.infllm_flex, name).default._schema)
            parts += [f"#### `{name}`", code_block(wrap_call(schema)), *describe(docstring)]
    return "\n\n".join(parts) + "\n"


def _describe_object(name: str, value: Any) -> list[str]:
    docstring = inspect.getdoc(value) or ""
    if not inspect.isclass(value):
        return [f"### `{name}`", code_block(signature_of(name, value)), *describe(docstring)]
    if issubclass(value, Exception):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        return [f"### `{name}`", code_block(f"class {name}({bases})"), *describe(docstring)]
    parts = [f"### `{name}`", code_block(signature_of(name, value)), *describe(docstring)]
    for member_name, member in vars(value).items():
        if member_name.startswith("_") or not inspect.getdoc(member):
            continue
        title = f"{name}.{member_name}"
        if isinstance(member, property):
            parts += [f"#### `{title}`", *describe(inspect.getdoc(member) or "")]
        elif callable(getattr(value, member_name)):
            bound = getattr(value, member_name)
            parts += [
                f"#### `{title}`",
                code_block(signature_of(title, bound, method=inspect.isfunction(bound))),
                *describe(inspect.getdoc(member) or ""),
            ]
    return parts


def _operators() -> dict[str, dict[str, str]]:
    """Return the docstrings of the definitions of all operators, by stage and name."""
    found: dict[str, dict[str, str]] = {stage: {} for stage in (*_STAGES, "others")}
    for module in _modules(infllm_flex_ops):
        for name, value in vars(module).items():
            if isinstance(value, CustomOpDef):
                definition = value.plain  # type: ignore[attr-defined]
                stage = definition.__module__.split(".")[1]
                stage = stage if stage in _STAGES else "others"
                found[stage][name] = inspect.getdoc(definition) or ""
    return {stage.replace("_", " ").capitalize(): operators for stage, operators in found.items()}


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    """Import all modules of the operators except the kernels."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        parts = info.name.split(".")
        if "kernels" not in parts and "triton_common" not in parts:
            yield importlib.import_module(info.name)
