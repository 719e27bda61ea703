"""Strict YAML to typed dataclasses: every mistake is named with its line, all of them at once."""

from infllm_flex.strict_yaml.build import build_dataclass
from infllm_flex.strict_yaml.document import Node, load_yaml
from infllm_flex.strict_yaml.dump import to_yaml
from infllm_flex.strict_yaml.mistakes import ConfigError, Mistake

__all__ = ["ConfigError", "Mistake", "Node", "build_dataclass", "load_yaml", "to_yaml"]
