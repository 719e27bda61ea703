"""Groups of kernels, by the names that a profile shows."""

from __future__ import annotations

import ast
import functools
import re

from benchmarking.checkout import ROOT

GROUPS = ("products", "selection", "lists", "attention", "copies", "elementwise", "other")

_STAGES = {"selection": "selection", "block_lists": "lists", "block_attention": "attention"}
# The first match decides. Attention kernels of cuDNN and CUTLASS are named after their products
# too, and fused kernels of Inductor after all of their operations.
_PATTERNS = (
    ("elementwise", r"^triton_(poi|red|per)_"),
    ("attention", r"sdpa|flash|fmha|attention"),
    ("products", r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|aten::(mm|addmm|bmm|baddbmm|linear)"),
    ("copies", r"memcpy|memset|copy|catarray|aten::(cat|fill_|zero_)"),
    (
        "elementwise",
        r"elementwise|vectorized|reduce|norm|softmax|index|embedding|argmax"
        r"|aten::(mul|add|sub|div|silu|pow|mean|rsqrt|neg|where|arange|cos|sin|lerp|exp|log|sum)",
    ),
)


def group_of(name: str) -> str:
    """Return the group of a kernel, or of an operator on a CPU."""
    stage = _own_kernels().get(name) or _own_operators().get(name.removeprefix("infllm_flex::"))
    if stage is not None:
        return stage
    lower = name.lower()
    return next((group for group, pattern in _PATTERNS if re.search(pattern, lower)), "other")


@functools.cache
def _own_kernels() -> dict[str, str]:
    """The kernels of this package by name, with the stage whose folder holds each."""
    found = {}
    for folder, stage in _STAGES.items():
        for path in sorted((ROOT / "custom_ops/infllm_flex_ops" / folder).rglob("kernels/**/*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.decorator_list:
                    found[node.name] = stage
    return found


@functools.cache
def _own_operators() -> dict[str, str]:
    """The operators of this package by name, with their stage."""
    found = {}
    for folder, stage in _STAGES.items():
        for path in (ROOT / "custom_ops/infllm_flex_ops" / folder).glob("*.py"):
            found[path.stem] = stage
    return found
