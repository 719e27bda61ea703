"""Shapes that all cases share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from infllm_flex.strict_yaml import check_range


class Heads(NamedTuple):
    """Query heads and key/value heads."""

    query: int
    kv: int

    @classmethod
    def read(cls, text: str) -> Heads:
        """Read a pair such as ``8/2``.

        Raises:
            ValueError: It is none, or the second number does not divide the first.
        """
        match = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", text)
        if not match or int(match[1]) % int(match[2]):
            raise ValueError(
                f"heads must be pairs such as 8/2, the first a multiple of the second, got {text}"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.query}/{self.kv}"


@dataclass(frozen=True, kw_only=True)
class ShapeSettings:
    """Shapes that all cases share.

    Attributes:
        heads: Pairs of query and key/value heads, such as ``8/2``; every case runs with each pair.
        head_dim: ``D``.
        batch: ``B``.
    """

    heads: tuple[str, ...]
    head_dim: int
    batch: int = 1

    def __post_init__(self) -> None:
        check_range("head_dim", self.head_dim, 8, 256)
        check_range("batch", self.batch, 1, 65_536)
        if not self.heads:
            raise ValueError("heads must list at least one pair such as 8/2, got none")
        for pair in self.heads:
            Heads.read(pair)

    @property
    def pairs(self) -> tuple[Heads, ...]:
        """``heads`` as numbers."""
        return tuple(Heads.read(pair) for pair in self.heads)
