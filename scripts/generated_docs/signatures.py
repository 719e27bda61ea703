"""Signatures as they stand in the source, an argument a line where they are long."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar


class _Annotation:
    """An annotation that `inspect.Signature` prints as it stands in the source."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def signature_of(name: str, function: Callable[..., Any], method: bool = False) -> str:
    """Return the call of a function with its annotations, without ``self`` where it is a method."""
    signature = inspect.signature(function)
    names = inspect.unwrap(function).__globals__ if inspect.isroutine(function) else {}

    def shown(annotation: Any) -> Any:
        if not isinstance(annotation, str):
            return annotation
        meant = names.get(annotation)
        if isinstance(meant, TypeVar) and meant.__bound__ is not None:
            annotation = f"nn.{meant.__bound__.__name__}"
        return _Annotation(annotation)

    parameters = [
        parameter.replace(annotation=shown(parameter.annotation))
        for parameter in list(signature.parameters.values())[1 if method else 0 :]
    ]
    result = signature.return_annotation
    result = inspect.Signature.empty if result in ("None", None) else shown(result)
    return wrap_call(f"{name}{inspect.Signature(parameters, return_annotation=result)}")


def wrap_call(call: str) -> str:
    """Put every argument of a long signature or schema on a line of its own."""
    if len(call) <= 96:
        return call
    head, rest = call.split("(", 1)
    arguments, depth = [""], 0
    for position, letter in enumerate(rest):  # noqa: B007
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += letter
    lines = [f"    {argument.strip()}," for argument in arguments]
    return "\n".join([f"{head}(", *lines, rest[position:]])
