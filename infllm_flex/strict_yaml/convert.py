"""Convert one YAML value to the type of its setting."""

from __future__ import annotations

import math
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from infllm_flex.strict_yaml.document import Node

_INTEGER = re.compile(r"[-+]?(0|[1-9](_?[0-9])*)")
_NUMBER = re.compile(r"[-+]?([0-9](_?[0-9])*)?\.?[0-9]*([eE][-+]?[0-9]+)?")
_LARGEST = 2**63 - 1
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def convert_scalar(node: Node, wanted: Any) -> Any:
    """Convert a node to ``wanted``: bool, int, float, str, Path or a Literal of these.

    Raises:
        ValueError: The node has another type; the message says what was expected and what came.
        TypeError: ``wanted`` is not supported.
    """
    if get_origin(wanted) is Literal:
        return _to_choice(node, get_args(wanted))
    converter = _CONVERTERS.get(wanted)
    if converter is None:
        raise TypeError(f"settings of type {wanted} are not supported ({node.key})")
    if not isinstance(node.value, str) or node.tag == "null":
        raise ValueError(f"expected {_NAMES[wanted]}, got {node.describe()}")
    return converter(node, node.value)


def split_optional(wanted: Any) -> tuple[Any, bool]:
    """Return ``(X, True)`` for ``X | None``, and ``(wanted, False)`` for any other type."""
    if get_origin(wanted) in (Union, types.UnionType):
        inner = [member for member in get_args(wanted) if member is not type(None)]
        if len(inner) == 1 and len(get_args(wanted)) == 2:
            return inner[0], True
        raise TypeError(f"settings of type {wanted} are not supported")
    return wanted, False


def _to_bool(node: Node, text: str) -> bool:
    if node.quoted or text.lower() not in _BOOLEANS:
        raise ValueError(f"expected true or false, got {node.describe()}")
    return _BOOLEANS[text.lower()]


def _to_int(node: Node, text: str) -> int:
    if node.quoted or not _INTEGER.fullmatch(text):
        raise ValueError(f"expected an integer, got {node.describe()}")
    if len(text) > 30 or abs(int(text)) > _LARGEST:
        raise ValueError(f"expected an integer of at most {_LARGEST}, got {text[:40]}")
    return int(text)


def _to_float(node: Node, text: str) -> float:
    digits = text.lower().partition("e")[0].strip("+-._")
    if node.quoted or not digits or not _NUMBER.fullmatch(text):
        raise ValueError(f"expected a number, got {node.describe()}")
    number = float(text.replace("_", ""))
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {text}")
    return number


def _to_str(node: Node, text: str) -> str:
    # Unquoted `no` or `1.10` is a boolean or a number to YAML readers, so text needs quotes.
    if not node.quoted and node.tag in ("int", "float", "bool"):
        raise ValueError(f"expected text, got {text} (put it in quotes)")
    return text


def _to_path(node: Node, text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError("expected a path, got empty text")
    return Path(text).expanduser()


def _to_choice(node: Node, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if not isinstance(node.value, str):
            continue
        try:
            converted = choice if isinstance(choice, str) else convert_scalar(node, type(choice))
        except ValueError:
            continue
        if converted == choice and (not isinstance(choice, str) or node.value == choice):
            return choice
    listed = ", ".join(str(choice) for choice in choices)
    raise ValueError(f"expected one of {listed}, got {node.describe()}")


_CONVERTERS = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, Path: _to_path}
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
