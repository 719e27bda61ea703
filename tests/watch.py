"""See how large the tensors get that some code makes."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WatchTensors(TorchDispatchMode):
    """Keep the largest storage, in bytes, of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest_bytes = max(self.largest_bytes, x.untyped_storage().nbytes())
        return out
