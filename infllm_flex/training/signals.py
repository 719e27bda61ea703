"""Ctrl-C and SIGTERM: say so, finish the step, save, leave. A second one leaves at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


class Interruption:
    """Notes a request to stop while in its ``with`` block.

    Python runs a signal's handler between two of its own instructions, and a backward pass may take
    minutes between two. So a thread answers: it wakes at the very signal.

    Args:
        show: Whether to say so on standard error.

    Attributes:
        signal: The signal that came, 0 while none did.
    """

    def __init__(self, show: bool = True) -> None:
        self.signal = 0
        self._show = show
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Interruption:
        # Python delivers signals to the main thread only; elsewhere there is nothing to catch.
        if threading.current_thread() is threading.main_thread():
            with contextlib.ExitStack() as stack:
                # In this order: once it is undone, no thread touches the handlers any more.
                stack.enter_context(self._handling())
                stack.enter_context(self._answering())
                self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _handling(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_DFL)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Let a thread read the numbers of the signals that come inside the block."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._answer, args=(reader,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)
            thread.join()
            os.close(reader)

    def _answer(self, reader: int) -> None:
        while numbers := os.read(reader, 1):
            if numbers[0] in _SIGNALS:
                _let_the_next_one_end_the_process()
                if self._show:
                    os.write(_STDERR, _announcement(numbers[0]))
                return


def _let_the_next_one_end_the_process() -> None:
    """Restore the default handlers as `signal.signal` does, which only the main thread may call."""
    restore = ctypes.CDLL(None).signal
    restore.argtypes, restore.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    for number in _SIGNALS:
        restore(number, None)


def _announcement(number: int) -> bytes:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    text = f"\n{name}: stopping after this step, then saving; a second one ends the run unsaved\n"
    return text.encode()
