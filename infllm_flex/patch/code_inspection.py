"""Read from the code of a module's class how it attends, without running it.

`calls_sdpa` and `other_attention` read the names in compiled code. The others read source
text, because a model with an encoder and a decoder must be patched without a list of its layers;
the first forward would otherwise refuse the encoder.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

from infllm_flex.patch.class_swap import original_class

_SDPA = "scaled_dot_product_attention"
_OTHERS = ("softmax", "flex_attention", "flash_attn_func", "multi_head_attention_forward")
_POSITIONS = {"attn_mask": 3, "is_causal": 5}  # among SDPA's arguments


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
    return _all_calls(module, lambda call: not _may_have(call, module, "attn_mask", "is_causal"))


def causal_by_mask_alone(module: nn.Module) -> bool:
    """Whether no SDPA call in the module's code sets ``is_causal``. False if it does not tell."""
    return _all_calls(module, lambda call: not _may_have(call, module, "is_causal"))


def learns_mask(module: nn.Module) -> bool:
    """Whether the mask of every SDPA call comes from a parameter or submodule: a learned bias.

    A mask that is itself stored as a parameter may be causal.
    """
    functions = _sdpa_functions(original_class(module))
    pairs = [(function, call) for function in functions for call in _sdpa_calls(function)]
    return bool(pairs) and all(_has_learned_mask(f, call, module) for f, call in pairs)


def _all_calls(module: nn.Module, holds: Callable[[ast.Call], bool]) -> bool:
    calls = [call for f in _sdpa_functions(original_class(module)) for call in _sdpa_calls(f)]
    return bool(calls) and all(map(holds, calls))


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
def _nodes(function: FunctionType) -> tuple[ast.AST, ...]:
    """The syntax of a function; nothing where its source is not available."""
    try:
        return tuple(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, TypeError, SyntaxError):
        return ()


@functools.cache
def _sdpa_calls(function: FunctionType) -> tuple[ast.Call, ...]:
    """The SDPA calls in the source of a function; none where the source is not available."""
    calls = (node for node in _nodes(function) if isinstance(node, ast.Call))
    return tuple(call for call in calls if _called_name(call) in _sdpa_names(function))


def _called_name(call: ast.Call) -> str | None:
    return getattr(call.func, "attr", getattr(call.func, "id", None))


def _may_have(call: ast.Call, module: nn.Module, *arguments: str) -> bool:
    """Whether an SDPA call may give one of some arguments a value other than None and False."""
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return True
    if any(word.arg is None for word in call.keywords):  # **kwargs
        return True
    given = (_argument(call, name) for name in arguments)
    return any(x is not None and _value(x, module) not in (None, False) for x in given)


def _argument(call: ast.Call, name: str) -> ast.expr | None:
    position = _POSITIONS[name]
    by_position = call.args[position] if len(call.args) > position else None
    return next((word.value for word in call.keywords if word.arg == name), by_position)


def _value(expression: ast.expr, module: nn.Module) -> Any:
    """Evaluate a constant or a flag of the module; True where only a run would tell the value."""
    if isinstance(expression, ast.Constant):
        return expression.value
    if isinstance(expression, ast.Attribute) and getattr(expression.value, "id", None) == "self":
        value = getattr(module, expression.attr, True)
        return value if isinstance(value, bool) else True
    return True


def _has_learned_mask(function: FunctionType, call: ast.Call, module: nn.Module) -> bool:
    mask = _argument(call, "attn_mask")
    known: set[str] = set()
    queue = [] if mask is None else [mask]
    while queue:
        source = queue.pop()
        name = _root(source)
        assigned = [] if name is None else _assigned(function, name)
        if assigned and name not in known:
            queue += assigned
        elif not assigned and any(_is_learned(node, module) for node in ast.walk(source)):
            return True
        known.add(str(name))
    return False


def _root(expression: ast.expr) -> str | None:
    """The variable that an expression reshapes, indexes or converts; None for any other."""
    while True:
        if isinstance(expression, ast.Name):
            return expression.id
        if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
            expression = expression.func.value
        elif isinstance(expression, ast.Subscript):
            expression = expression.value
        else:
            return None


def _assigned(function: FunctionType, name: str) -> list[ast.expr]:
    """The expressions that a function assigns to a variable, alone."""
    found: list[ast.expr] = []
    for node in _nodes(function):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if name in (getattr(target, "id", None) for target in targets):
            value = getattr(node, "value", None)
            found += [value] if isinstance(value, ast.expr) else []
    return found


def _is_learned(node: ast.AST, module: nn.Module) -> bool:
    """Whether a node of an expression gives a parameter to a call, or calls a trained submodule."""
    if not isinstance(node, ast.Call):
        return False
    called = _own(node.func, module)
    if isinstance(called, nn.Module):
        return next(called.parameters(), None) is not None
    given = (_own(x, module) for x in (*node.args, *(word.value for word in node.keywords)))
    return any(isinstance(x, nn.Parameter) and x.is_floating_point() for x in given)


def _own(expression: ast.expr, module: nn.Module) -> Any:
    """The attribute of the module that an expression reads; None for any other expression."""
    if isinstance(expression, ast.Attribute) and getattr(expression.value, "id", None) == "self":
        return getattr(module, expression.attr, None)
    return None
