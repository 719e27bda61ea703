"""docs/settings.md: the settings of attention and of a training run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from typing import Any

from generated_docs.docstrings import items, paragraphs, split_sections
from infllm_flex import InfLLMConfig
from infllm_flex.training.settings import TrainingSettings

_SETTINGS = """
Values are checked when they are read. An unknown name is an error that names the nearest known one.
"""
_ATTENTION = """
`InfLLMConfig(...)`, `patch_model(model, NAME=VALUE)`, `sparse_config` in a model's `config.json`
and `attention:` in a YAML file take the same names. [Choosing settings](choosing-settings.md) says
which values to take.
"""
_FINE_TUNING = """
The sections of the file that `scripts/finetune.py --config FILE` reads, beside `attention:`.
`SECTION.NAME=VALUE` on the command line overrides the file.
[Fine-tuning](fine-tuning.md) shows how the sections work together.
"""


def settings_page() -> str:
    """Describe the settings of attention and of a training run."""
    sections = typing.get_type_hints(TrainingSettings)
    parts = ["# Settings", *paragraphs(_SETTINGS), "## Attention"]
    parts += [*paragraphs(_ATTENTION), *_describe_settings(InfLLMConfig)]
    parts += ["## Fine-tuning", *paragraphs(_FINE_TUNING)]
    for name, kind in sections.items():
        if kind is InfLLMConfig:
            continue
        section = _settings_class(kind)
        nested = f"{name}.NAME" if section is not kind else name
        parts += [f"### `{nested}`", *_describe_settings(section)]
        for inner, inner_kind in typing.get_type_hints(section).items():
            if (inner_class := _settings_class(inner_kind)) is not None:
                parts += [f"### `{nested}.{inner}`", *_describe_settings(inner_class)]
    return "\n\n".join(parts) + "\n"


def _settings_class(kind: Any) -> Any:
    """Return the settings class in an annotation such as ``dict[str, X]`` or ``X | None``."""
    candidates = (kind, *typing.get_args(kind))
    return next((c for c in candidates if dataclasses.is_dataclass(c)), None)


def _describe_settings(settings: type[Any]) -> list[str]:
    docstring = inspect.getdoc(settings) or ""
    meanings = items(docstring, "Attributes")
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(settings):
        meaning = meanings[field.name].replace("|", "\\|")
        rows.append(f"| `{field.name}` | {_default(field)} | {meaning} |")
    return [*paragraphs(split_sections(docstring)[""]), "\n".join(rows)]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else ""
    default = field.default
    if default is None or isinstance(default, bool | str | tuple):
        return f"`{json.dumps(default)}`".replace('"', "" if default else '"')  # as YAML has it
    return f"`{default}`"
