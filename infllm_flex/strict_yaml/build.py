"""Build a dataclass from a section of a document, or report all mistakes of the section."""

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
    """Build ``cls`` from a section; checks names and types and fills in defaults.

    A field can have the type bool, int, float, str, Path, a Literal or another dataclass, one of
    these ``| None``, ``list[X]``, ``tuple[X, ...]`` or ``dict[str, X]``. A ``__post_init__`` may
    raise a ValueError with one or more lines; a line that begins with the name of a field is
    reported at that field.

    Args:
        cls: The dataclass.
        section: A node of the document, usually ``document`` or ``document.section(name)``.

    Raises:
        ConfigError: Lists every mistake of the section and its subsections.
    """
    builder = _Builder()
    built = builder.build(section, cls)
    if builder.mistakes:
        raise ConfigError(builder.mistakes)
    return built


class _Builder:
    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def _report(self, node: Node, problem: str, key: str | None = None) -> None:
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
            self._report(node, str(error))
            return _FAILED

    def _build_list(self, node: Node, sequence: type, element: Any) -> Any:
        if not isinstance(node.value, list):
            self._report(node, f"expected a list, got {node.describe()}")
            return _FAILED
        built = [self.build(child, element) for child in node.value]
        return _FAILED if _FAILED in built else sequence(built)

    def _build_mapping(self, node: Node, element: Any) -> Any:
        if not node.is_section:
            self._report(node, f"expected a section, got {node.describe()}")
            return _FAILED
        built = {name: self.build(child, element) for name, child in node.entries.items()}
        return _FAILED if any(value is _FAILED for value in built.values()) else built

    def _build_section(self, node: Node, cls: Any) -> Any:
        if not node.is_section and node.tag != "null":
            self._report(node, f"expected a section, got {node.describe()}")
            return _FAILED
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        hints = get_type_hints(cls)
        before = len(self.mistakes)
        for name, child in node.entries.items():
            if name not in fields:
                self._report(child, f"unknown key ({_nearest(name, fields)})")
        values = {
            name: self.build(child, hints[name])
            for name, child in node.entries.items()
            if name in fields
        }
        for name, field in fields.items():
            if name not in values and _is_required(field):
                key = f"{node.key}.{name}" if node.key else name
                self._report(node, "is missing and has no default", key)
                values[name] = _FAILED
        built = self._construct(node, cls, fields, values)
        return built if len(self.mistakes) == before else _FAILED

    def _construct(
        self, node: Node, cls: Any, fields: Mapping[str, Any], values: dict[str, Any]
    ) -> Any:
        """Call the dataclass and report its mistakes; repeat without the wrong fields to find all.

        A field that is already known to be wrong takes its default, and mistakes that name it are
        not reported.
        """
        wrong = {name for name, value in values.items() if value is _FAILED}
        while not any(_is_required(fields[name]) for name in wrong):
            try:
                return cls(**{name: v for name, v in values.items() if name not in wrong})
            except ValueError as error:
                newly_wrong = set()
                for line in str(error).splitlines():
                    named = [name for name in re.findall(r"\w+", line) if name in fields]
                    if not wrong.intersection(named):
                        self._report_field(node, line)
                    newly_wrong.update(named[:1])
                if not newly_wrong - wrong:
                    return _FAILED
                wrong |= newly_wrong
        return _FAILED

    def _report_field(self, node: Node, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name in node.entries:
            self._report(node.entries[name], rest if rest.startswith("must ") else line)
            return
        # The first named field has its default: locate the mistake at one that is in the file.
        written = [word for word in re.findall(r"\w+", line) if word in node.entries]
        self._report(node.entries[written[0]] if written else node, line, node.key)


def _nearest(name: str, fields: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, fields, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing
