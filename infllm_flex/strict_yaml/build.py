"""A section of a document as an instance of a dataclass, or the list of all that is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from infllm_flex.strict_yaml.convert import convert_scalar, split_optional
from infllm_flex.strict_yaml.document import Node
from infllm_flex.strict_yaml.mistakes import ConfigError, Mistake

T = TypeVar("T")

_FAILED = object()


def build_dataclass(cls: type[T], section: Node) -> T:
    """Build ``cls`` from a section: names and types checked, defaults filled in.

    Field types may be bool, int, float, str, Path, a Literal, another dataclass, any of those
    ``| None``, ``list[X]``, ``tuple[X, ...]`` and ``dict[str, X]``. A ``__post_init__`` may raise
    a ValueError of one or more lines; a line that starts with a field's name is reported at it.

    Args:
        cls: The dataclass.
        section: A node of the document, usually ``document`` or ``document.section(name)``.

    Raises:
        ConfigError: With every mistake of the section and of those inside it.
    """
    builder = _Builder()
    built = builder.build(section, cls)
    if builder.mistakes:
        raise ConfigError(builder.mistakes)
    return built


class _Builder:
    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def _say(self, node: Node, problem: str, key: str | None = None) -> None:
        self.mistakes.append(Mistake(node.where, node.key if key is None else key, problem))

    def build(self, node: Node, wanted: Any) -> Any:
        wanted, optional = split_optional(wanted)
        if optional and node.tag == "null":
            return None
        if dataclasses.is_dataclass(wanted):
            return self._build_section(node, wanted)
        if get_origin(wanted) is dict:
            return self._build_mapping(node, get_args(wanted)[1])
        if get_origin(wanted) in (list, tuple):
            return self._build_list(node, get_origin(wanted), get_args(wanted)[0])
        try:
            return convert_scalar(node, wanted)
        except ValueError as error:
            self._say(node, str(error))
            return _FAILED

    def _build_list(self, node: Node, sequence: type, element: Any) -> Any:
        if not isinstance(node.value, list):
            self._say(node, f"expected a list, got {node.describe()}")
            return _FAILED
        built = [self.build(child, element) for child in node.value]
        return _FAILED if _FAILED in built else sequence(built)

    def _build_mapping(self, node: Node, element: Any) -> Any:
        if not node.is_section:
            self._say(node, f"expected a section, got {node.describe()}")
            return _FAILED
        built = {name: self.build(child, element) for name, child in node.entries.items()}
        return _FAILED if any(value is _FAILED for value in built.values()) else built

    def _build_section(self, node: Node, cls: Any) -> Any:
        if not node.is_section and node.tag != "null":
            self._say(node, f"expected a section, got {node.describe()}")
            return _FAILED
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        hints = get_type_hints(cls)
        before = len(self.mistakes)
        for name, child in node.entries.items():
            if name not in fields:
                self._say(child, f"unknown key ({_nearest(name, fields)})")
        values = {
            name: self.build(child, hints[name])
            for name, child in node.entries.items()
            if name in fields
        }
        for name, field in fields.items():
            if name not in values and _is_required(field):
                key = f"{node.key}.{name}" if node.key else name
                self._say(node, "is missing and has no default", key)
                values[name] = _FAILED
        built = self._construct(node, cls, fields, values)
        return built if len(self.mistakes) == before else _FAILED

    def _construct(
        self, node: Node, cls: Any, fields: Mapping[str, Any], values: dict[str, Any]
    ) -> Any:
        """Run the dataclass's own checks, again without each offender, to hear all of them.

        A setting already known to be wrong falls back to its default meanwhile, and what is said
        about that default is not repeated to the user.
        """
        wrong = {name for name, value in values.items() if value is _FAILED}
        while not any(_is_required(fields[name]) for name in wrong):
            try:
                return cls(**{name: v for name, v in values.items() if name not in wrong})
            except ValueError as error:
                found = set()
                for line in str(error).splitlines():
                    named = [name for name in re.findall(r"\w+", line) if name in fields]
                    if not wrong.intersection(named):
                        self._say_of_field(node, line)
                    found.update(named[:1])
                if not found - wrong:
                    return _FAILED
                wrong |= found
        return _FAILED

    def _say_of_field(self, node: Node, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name in node.entries:
            self._say(node.entries[name], rest if rest.startswith("must ") else line)
            return
        # A default in conflict with what is written: show the line of what is written.
        written = [word for word in re.findall(r"\w+", line) if word in node.entries]
        self._say(node.entries[written[0]] if written else node, line, node.key)


def _nearest(name: str, fields: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, fields, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing
