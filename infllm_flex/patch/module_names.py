"""Find the modules that a user names as attention layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from infllm_flex.patch.class_swap import original_class

Names = str | type | nn.Module | Iterable[str | type | nn.Module]


def resolve_modules(model: nn.Module, names: Names) -> set[nn.Module]:
    """Find the named modules of a model.

    Args:
        model: The model.
        names: One or more names, classes or modules. A name is as in ``named_modules``; ``*`` in it
            stands for anything between two dots.

    Raises:
        ValueError: No module has a name (the error shows the nearest one), or no name is given.
        TypeError: An item is neither a name, nor a class, nor a module.
    """
    single = isinstance(names, str | type | nn.Module)
    wanted = [names] if single else list(names)  # type: ignore[arg-type]
    if not wanted:
        raise ValueError("attention_modules must name at least one module, got none")
    return {module for name in wanted for module in _resolve(model, name)}  # type: ignore[arg-type]


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _resolve(model: nn.Module, wanted: str | type | nn.Module) -> list[nn.Module]:
    modules = dict(model.named_modules())
    if isinstance(wanted, str):
        found = [module for name, module in modules.items() if _matches(name, wanted)]
        near = difflib.get_close_matches(wanted, modules, n=1)
    elif isinstance(wanted, type):
        found = [m for m in modules.values() if issubclass(original_class(m), wanted)]
        near = []
    elif isinstance(wanted, nn.Module):
        found = [module for module in modules.values() if module is wanted]
        near = []
    else:
        raise TypeError(
            f"attention_modules must hold names, classes or modules, got {type(wanted).__name__}"
        )
    if not found:
        what = (
            repr(wanted) if isinstance(wanted, str) else getattr(wanted, "__name__", "the module")
        )
        hint = f"did you mean {near[0]!r}?" if near else "see model.named_modules()"
        raise ValueError(f"attention_modules: {type(model).__name__} has no {what} ({hint})")
    return found
