"""Read from the code of a module's class how it attends, without running it.

`calls_sdpa` and `other_attention` read the names in compiled code. `never_causal` reads source
text, because a model with an encoder and a decoder must be patched without a list of its layers;
the first forward would otherwise refuse the encoder.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

from infllm_flex.patch.class_swap import original_class

_SDPA = "scaled_dot_product_attention"
_OTHERS = ("softmax", "flex_attention", "flash_attn_func", "multi_head_attention_forward")
_MASK_AT, _CAUSAL_AT = 3, 5  # positions of attn_mask and is_causal among SDPA's arguments


def calls_sdpa(module: nn.Module) -> bool:
    """Whether code of the module, or a helper that it calls, names SDPA. It may never run."""
    if _sdpa_functions(original_class(module)):
        return True
    stored = [value for value in vars(module).values() if isinstance(value, FunctionType)]
    return any(_sdpa_names(function) for function in stored)


def other_attention(module: nn.Module) -> str | None:
    """The name of another attention function, or of softmax, in the module's own code, if any."""
    for function in _members(original_class(module)):
        found = names(function.__code__)
        for name in _OTHERS:
            if name in found:
                return name
    return None


def never_causal(module: nn.Module) -> bool:
    """Whether every SDPA call in the module's code lacks both ``is_causal`` and a mask.

    False where the code does not tell, or its source is not available.
    """
    calls = [call for f in _sdpa_functions(original_class(module)) for call in _sdpa_calls(f)]
    return bool(calls) and not any(_may_be_causal(call, module) for call in calls)


def mentions(module: nn.Module, word: str) -> bool:
    """Whether a name in the functions that call SDPA contains ``word``."""
    functions = _sdpa_functions(original_class(module))
    return any(word in name.lower() for f in functions for name in names(f.__code__))


@functools.cache
def _sdpa_functions(cls: type) -> tuple[FunctionType, ...]:
    """The functions that name SDPA: methods of the class and plain functions that they call."""
    found: list[FunctionType] = []
    seen: set[FunctionType] = set()
    queue = list(_functions(cls))
    while queue:
        function = queue.pop()
        if function in seen:
            continue
        seen.add(function)
        if _sdpa_names(function):
            found.append(function)
        helpers = [function.__globals__.get(name) for name in names(function.__code__)]
        plain = (inspect.unwrap(f) for f in helpers if isinstance(f, FunctionType))
        queue.extend(f for f in plain if isinstance(f, FunctionType) and _is_users(f.__module__))
    return tuple(found)


def _functions(cls: type) -> Iterator[FunctionType]:
    """User-defined methods of a class, including inherited ones that are not overridden."""
    taken: set[str] = set()
    for base in cls.__mro__:
        own = list(_members(base))
        yield from (function for function in own if function.__name__ not in taken)
        # A method that calls `super` does not hide the base's method.
        taken.update(f.__name__ for f in own if "super" not in f.__code__.co_names)


def _members(cls: type) -> Iterator[FunctionType]:
    """Functions that a class itself defines, but ``__init__``; none for PyTorch's own classes."""
    for name, member in vars(cls).items() if _is_users(cls.__module__) else ():
        member = inspect.unwrap(getattr(member, "__func__", member))
        if isinstance(member, FunctionType) and name != "__init__":
            yield member


def _is_users(module: str | None) -> bool:
    return (module or "").partition(".")[0] not in ("torch", "builtins", "infllm_flex")


def names(code: CodeType) -> set[str]:
    """All names that code reads or writes, including those of nested functions."""
    own = {*code.co_names, *code.co_varnames, *code.co_freevars}
    return own.union(*(names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _sdpa_names(function: FunctionType) -> set[str]:
    """The names under which a function may call SDPA, including aliases of its module."""
    found = names(function.__code__)
    scope = function.__globals__
    return {n for n in found if n == _SDPA or scope.get(n) is F.scaled_dot_product_attention}


@functools.cache
def _sdpa_calls(function: FunctionType) -> tuple[ast.Call, ...]:
    """The SDPA calls in the source of a function; none where the source is not available."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ()
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return tuple(call for call in calls if _called_name(call) in _sdpa_names(function))


def _called_name(call: ast.Call) -> str | None:
    return getattr(call.func, "attr", getattr(call.func, "id", None))


def _may_be_causal(call: ast.Call, module: nn.Module) -> bool:
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return True
    given: dict[str | None, ast.expr] = {word.arg: word.value for word in call.keywords}
    if None in given:  # **kwargs
        return True
    for name, position in (("attn_mask", _MASK_AT), ("is_causal", _CAUSAL_AT)):
        argument = given.get(name, call.args[position] if len(call.args) > position else None)
        if argument is not None and _value(argument, module) not in (None, False):
            return True
    return False


def _value(expression: ast.expr, module: nn.Module) -> Any:
    """Evaluate a constant or a flag of the module; True where only a run would tell the value."""
    if isinstance(expression, ast.Constant):
        return expression.value
    if isinstance(expression, ast.Attribute) and getattr(expression.value, "id", None) == "self":
        value = getattr(module, expression.attr, True)
        return value if isinstance(value, bool) else True
    return True
