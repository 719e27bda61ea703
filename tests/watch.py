"""Measure the largest tensor that some code makes."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WatchTensors(TorchDispatchMode):
    """Keep the largest storage, in bytes, of any tensor that an operation returns.

    Views of the tensors ``besides`` do not count.
    """

    def __init__(self, *besides: torch.Tensor) -> None:
        super().__init__()
        self.largest_bytes = 0
        self._besides = {x.untyped_storage().data_ptr() for x in besides}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._besides:
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        return out
