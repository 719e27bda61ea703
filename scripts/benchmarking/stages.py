"""The building of block lists apart from the attention over them, without changing either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from infllm_flex.engines import choose as engines
from infllm_flex_ops.block_lists import union_lists

# Where attention asks for lists; only the outermost of nested calls counts.
_SEAMS = (
    (engines, "build_block_mask"),
    (engines, "build_split_masks"),
    (union_lists, "list_blocks"),
)


class RecordedLists:
    """The calls by which an attention builds its lists, and their results.

    Args:
        attend: Runs the attention once, with inputs like those to be timed.

    Raises:
        RuntimeError: It built no lists where this module looks for them.
    """

    def __init__(self, attend: Callable[[], object]) -> None:
        self._calls: list[Callable[[], Any]] = []
        inside = False

        def record(original: Callable[..., Any]) -> Callable[..., Any]:
            def recorder(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                if inside:
                    return original(*args, **kwargs)
                self._calls.append(lambda: original(*args, **kwargs))
                inside = True
                try:
                    return original(*args, **kwargs)
                finally:
                    inside = False

            return recorder

        with _replaced(record):
            attend()
        if not self._calls:
            raise RuntimeError("the attention built no block lists: benchmarking/stages.py is old")
        self._results = self.build()

    def build(self) -> list[Any]:
        """Build the lists anew."""
        return [call() for call in self._calls]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside the block, attention finds its lists built."""
        results = iter(self._results)
        with _replaced(lambda _: lambda *args, **kwargs: next(results)):
            yield


@contextmanager
def _replaced(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    originals = [getattr(module, name) for module, name in _SEAMS]
    try:
        for (module, name), original in zip(_SEAMS, originals, strict=True):
            setattr(module, name, change(original))
        yield
    finally:
        for (module, name), original in zip(_SEAMS, originals, strict=True):
            setattr(module, name, original)
