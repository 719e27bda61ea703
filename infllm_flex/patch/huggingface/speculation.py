"""Keep a device busy while the host waits to read from it whether a batch is packed.

Most batches hold one sequence per row. A dense call for that case is launched before the answer is
known, and discarded if the batch turns out to be packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from infllm_flex.patch.host_read import HostRead
from infllm_flex.patch.layer_state import PatchedLayer


class Speculation:
    """A call for one sequence per row that may be launched before it is known to be right.

    Attributes:
        output: Result of the call; None if it was not launched.
    """

    __slots__ = ("_call", "_layer", "output")

    def __init__(self, layer: PatchedLayer, call: Callable[[], Any]) -> None:
        self._layer = layer
        self._call = call
        self.output: Any = None

    def launch(self) -> None:
        """Launch the call, unless the layer's last batch was packed."""
        if not self._layer.last_batch_was_packed:
            self.output = self._call()

    def note_result(self, is_packed: bool) -> None:
        """Remember for the layer's next batch whether this one is packed."""
        self._layer.last_batch_was_packed = is_packed


def read_flag(flag: Tensor, speculation: Speculation | None) -> bool:
    """Read a flag from its device; a speculative call keeps that device busy meanwhile."""
    if speculation is None or not flag.is_cuda:
        return bool(flag)
    read = HostRead(flag)
    speculation.launch()
    return bool(read.wait())
