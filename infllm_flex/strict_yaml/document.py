"""Parse YAML into a tree whose nodes know their lines.

Scalars stay text here; ``build`` converts them to the type of the setting. ``2e-5`` thus becomes a
number, which PyYAML's YAML 1.1 rules would read as a string.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from infllm_flex.strict_yaml.mistakes import ConfigError, Mistake

_MAX_BYTES = 1_000_000
_MAX_VALUES = 10_000  # with aliases expanded, so that a small file cannot grow large
_MAX_DEPTH = 20
_YAML_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")


@dataclass
class Node:
    """A value of a YAML document.

    Attributes:
        where: ``file:line``, or the override that set the value.
        key: Dotted path from the top of the document; empty for the top.
        value: Text of a scalar, children of a list, or children of a section by name.
        tag: The type that YAML resolves for a scalar: ``"str"``, ``"int"``, ``"float"``,
            ``"bool"``, ``"null"``, ...; otherwise ``"list"`` or ``"section"``.
        quoted: Whether a scalar is quoted or in a block.
    """

    where: str
    key: str
    value: str | list[Node] | dict[str, Node]
    tag: str
    quoted: bool = False

    @property
    def entries(self) -> dict[str, Node]:
        """The children of a section by name; none for a blank section."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def is_section(self) -> bool:
        """Whether this is a mapping of names to values."""
        return isinstance(self.value, dict)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def section(self, name: str) -> Node:
        """The child called ``name``.

        Raises:
            ConfigError: There is no such child.
        """
        if name not in self:
            raise ConfigError([Mistake(self.where, self.key, f"the section {name!r} is missing")])
        return self.entries[name]

    def describe(self) -> str:
        """The value, as an error message names it."""
        if self.tag == "section":
            return "a section"
        if self.tag == "list":
            return "a list"
        if self.tag == "null":
            return "nothing"
        if self.quoted:
            return f"the text {self.value!r}"
        return str(self.value)


def load_yaml(path: str | Path, overrides: Iterable[str] = ()) -> Node:
    """Read a YAML file of settings and apply overrides to it.

    Args:
        path: The file.
        overrides: Strings ``key.sub=value`` with a YAML value. A later override wins.

    Returns:
        The top section.

    Raises:
        ConfigError: The file is missing, a directory, empty, too large, not YAML or not a mapping,
            has a duplicate key, or an override is malformed.
    """
    path = Path(path)
    top = _parse(_read_text(path), str(path))
    mistakes: list[Mistake] = []
    node = _Reader(str(path), mistakes).read(top, key="", depth=0)
    for override in overrides:
        _apply(override, node, mistakes)
    if mistakes:
        raise ConfigError(mistakes)
    return node


def _read_text(path: Path) -> str:
    problem = None
    if path.is_dir():
        problem = "is a directory, expected a YAML file"
    elif not path.exists():
        problem = "no such file"
    else:
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
            if len(content) > _MAX_BYTES:
                problem = f"is larger than {_MAX_BYTES} bytes, expected a YAML file of settings"
            else:
                return content.decode("utf-8")
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 text (byte {error.start}), expected a YAML file"
    raise ConfigError([Mistake(str(path), "", problem)])


def _parse(text: str, name: str) -> yaml.Node:
    try:
        top = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError([Mistake(where, "", f"not YAML: {error.problem}")]) from error
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([Mistake(name, "", f"not YAML: {reason}")]) from error
    except RecursionError as error:
        raise ConfigError([Mistake(name, "", "is nested too deeply")]) from error
    if top is None:
        raise ConfigError([Mistake(name, "", "is empty, expected a mapping of settings")])
    if not isinstance(top, yaml.MappingNode):
        kind = "a list" if isinstance(top, yaml.SequenceNode) else f"{top.value!r}"
        problem = f"expected a mapping of settings at the top, got {kind}"
        raise ConfigError([Mistake(f"{name}:{top.start_mark.line + 1}", "", problem)])
    return top


class _Reader:
    """Converts PyYAML's nodes to `Node`; aliases are expanded, up to a fixed number of values."""

    def __init__(self, name: str, mistakes: list[Mistake], where: str | None = None) -> None:
        self._name, self._mistakes, self._where = name, mistakes, where
        self._values = 0

    def read(self, node: yaml.Node, key: str, depth: int) -> Node:
        where = self._where or f"{self._name}:{node.start_mark.line + 1}"
        self._values += 1
        if self._values > _MAX_VALUES or depth > _MAX_DEPTH:
            limit = f"{_MAX_VALUES} values" if depth <= _MAX_DEPTH else f"{_MAX_DEPTH} levels"
            raise ConfigError([Mistake(where, key, f"more than {limit} (aliases included)")])
        if isinstance(node, yaml.MappingNode):
            return self._read_section(node, where, key, depth)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, where, key, ("seq",))
            children = [self.read(n, f"{key}[{i}]", depth + 1) for i, n in enumerate(node.value)]
            return Node(where, key, children, "list")
        self._check_tag(node, where, key, _SCALAR_TAGS)
        tag = node.tag.removeprefix(_YAML_TAG)
        return Node(where, key, node.value, tag, quoted=bool(getattr(node, "style", None)))

    def _read_section(self, node: yaml.MappingNode, where: str, key: str, depth: int) -> Node:
        self._check_tag(node, where, key, ("map",))
        entries: dict[str, Node] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self._mistakes.append(Mistake(where, key, "the key of a setting must be text"))
                continue
            name = name_node.value
            child_key = f"{key}.{name}" if key else name
            child = self.read(value_node, child_key, depth + 1)
            if self._where is None:  # a section starts at its key, not at its first entry
                child.where = f"{self._name}:{name_node.start_mark.line + 1}"
            if name in entries:
                first_line = entries[name].where.rpartition(":")[2]
                problem = f"duplicate key, first in line {first_line}"
                self._mistakes.append(Mistake(child.where, child_key, problem))
            entries[name] = child
        return Node(where, key, entries, "section")

    def _check_tag(self, node: yaml.Node, where: str, key: str, allowed: tuple[str, ...]) -> None:
        if node.tag not in {_YAML_TAG + name for name in allowed}:
            self._mistakes.append(Mistake(where, key, f"the tag {node.tag} is not allowed"))


def _apply(override: str, top: Node, mistakes: list[Mistake]) -> None:
    where = f"override {override!r}"
    key, equals, text = override.partition("=")
    names = key.split(".")
    if not equals or not all(name.strip() == name and name for name in names):
        mistakes.append(Mistake(where, "", "expected key=value or section.key=value"))
        return
    try:
        parsed = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        quoted = "" if set(text) & set("'\"\\") else f"; as text: '{key}=\"{text}\"'"
        mistakes.append(Mistake(where, key, f"{text!r} is not a YAML value{quoted}"))
        return
    section = top
    for depth, name in enumerate(names[:-1], start=1):
        path = ".".join(names[:depth])
        child = section.entries.get(name)
        if child is None or child.tag == "null":
            child = Node(where, path, {}, "section")
            section.entries[name] = child
        elif not child.is_section:
            mistakes.append(Mistake(where, key, f"{path} is {child.describe()}, not a section"))
            return
        section = child
    if parsed is None:
        section.entries[names[-1]] = Node(where, key, "", "null")
    else:
        reader = _Reader("", mistakes, where)
        section.entries[names[-1]] = reader.read(parsed, key, depth=len(names))
