"""Numbers on their way from a device to the host, which goes on with its work meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


class HostRead:
    """A small tensor that is copied to the host from now on, and read when it is needed.

    The device can then work on what was launched in between while the host waits.
    """

    __slots__ = ("_event", "_held")

    def __init__(self, x: Tensor) -> None:
        self._held = x.detach()
        self._event: torch.cuda.Event | None = None
        if x.is_cuda:
            pinned = torch.empty_like(x, device="cpu", pin_memory=True)
            self._held = pinned.copy_(self._held, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(x.device))

    def wait(self) -> int:
        """The number, of a tensor with one element."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return int(self._held)
