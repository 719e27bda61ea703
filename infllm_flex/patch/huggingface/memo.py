"""One answer for all layers of a forward, which each ask the same about the same tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

_Answer = TypeVar("_Answer")


class Memo(Generic[_Answer]):
    """Remembers the last answer, and what was asked."""

    def __init__(self) -> None:
        # Question and answer in one, so that threads never mix theirs.
        self._last: tuple[_Question, _Answer] | None = None

    @property
    def last_answer(self) -> _Answer | None:
        """The last answer, whatever was asked."""
        return None if self._last is None else self._last[1]

    def recall(
        self,
        shape: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        answer: Callable[[], _Answer],
    ) -> _Answer:
        """The last answer if it was to the same question, else a new one.

        Args:
            shape: Part of the question.
            tensors: The rest of it: the same objects, unchanged since.
            answer: Finds the answer.
        """
        last = self._last
        if last is not None and last[0].is_same(shape, tensors):
            return last[1]
        new = answer()
        self._last = (_Question(shape, tensors), new)
        return new


class _Question:
    """What was asked, without keeping the tensors: an address or a tensor may be used again."""

    def __init__(self, shape: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> None:
        self._shape = shape
        self._tensors = [None if x is None else (weakref.ref(x), _version(x)) for x in tensors]

    def is_same(self, shape: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> bool:
        if self._shape != shape:
            return False
        for known, x in zip(self._tensors, tensors, strict=True):
            if known is None or x is None:
                if known is not x:
                    return False
            elif known[0]() is not x or known[1] is None or known[1] != _version(x):
                return False
        return True


def _version(x: Tensor) -> int | None:
    """Count of changes in place; None for inference tensors, which do not count them."""
    return None if x.is_inference() else x._version
