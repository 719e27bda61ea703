"""A message to the user while FlexAttention compiles."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)


class CompileNotice:
    """A message to the user, once, that a slow first call of a shape is compiling.

    Args:
        patience: Seconds that a first call may take without the message.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._shapes: set[tuple[object, ...]] = set()  # those that were compiled for
        self._is_given = False

    @contextmanager
    def watch(self, shape: tuple[object, ...]) -> Iterator[None]:
        """Time the call inside the block if it is the first of its shape."""
        if shape in self._shapes:
            yield
            return
        timer = threading.Timer(self._patience, self._give)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._shapes.add(shape)

    def _give(self) -> None:
        if not self._is_given:
            self._is_given = True
            _log.warning(
                "compiling FlexAttention for a new length: some seconds, once for each power of two"
            )
