"""Stop a run on Ctrl-C or SIGTERM after the current step; a second signal ends it at once."""

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


class StopSignal:
    """Records the first stop signal that arrives inside its ``with`` block.

    Python runs a signal handler between two bytecode instructions, which a backward pass can keep
    minutes apart. A separate thread therefore prints the message; the signal wakes it immediately.

    Args:
        show: Whether to print a message to standard error.

    Attributes:
        signal: Number of the received signal, 0 before one arrives.
    """

    def __init__(self, show: bool = True) -> None:
        self.signal = 0
        self._show = show
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StopSignal:
        # Python delivers signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            with contextlib.ExitStack() as stack:
                # The thread must end before the handlers are restored, because it changes them.
                stack.enter_context(self._installed_handlers())
                stack.enter_context(self._announcing_thread())
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
    def _installed_handlers(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._record) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    @contextlib.contextmanager
    def _announcing_thread(self) -> Iterator[None]:
        """Start a thread that reads the numbers of the signals from the wake-up pipe."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._announce, args=(reader,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)
            thread.join()
            os.close(reader)

    def _announce(self, reader: int) -> None:
        while numbers := os.read(reader, 1):
            if numbers[0] in _SIGNALS:
                _restore_default_handlers()
                if self._show:
                    os.write(_STDERR, _message(numbers[0]))
                return


def _restore_default_handlers() -> None:
    """Restore the default handlers from any thread; Python's own `signal.signal` refuses that."""
    restore = ctypes.CDLL(None).signal
    restore.argtypes, restore.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    for number in _SIGNALS:
        restore(number, None)


def _message(number: int) -> bytes:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    text = f"\n{name}: saving after this step, then stopping; a second one stops without saving\n"
    return text.encode()
