"""Read YAML into typed dataclasses; all mistakes of a file are reported at once, with lines."""

from infllm_flex.strict_yaml.build import build_dataclass
from infllm_flex.strict_yaml.checks import check_range
from infllm_flex.strict_yaml.document import Node, load_yaml
from infllm_flex.strict_yaml.dump import to_yaml
from infllm_flex.strict_yaml.mistakes import ConfigError, Mistake

__all__ = [
    "ConfigError",
    "Mistake",
    "Node",
    "build_dataclass",
    "check_range",
    "load_yaml",
    "to_yaml",
]
