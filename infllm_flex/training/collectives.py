"""Text and errors exchanged between the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class RankError(RuntimeError):
    """Another process of the run failed; the message is the one it reported."""


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Number of processes in the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_text(text: str) -> list[str]:
    """Gather one text from every process, in rank order. All processes must call it.

    Bytes in tensors, because ``all_gather_object`` pickles.
    """
    if num_ranks() == 1:
        return [text]
    encoded = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(num_ranks())]
    dist.all_gather(sizes, torch.tensor(len(text.encode())))
    longest = max(1, *map(int, sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(encoded)] = encoded
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [
        bytes(part[: int(size)].tolist()).decode()
        for part, size in zip(gathered, sizes, strict=True)
    ]


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run ``action`` in every process. If it fails in one process, every process raises.

    Raises:
        RankError: It failed in another process only.
    """
    own_error: Exception | None = None
    try:
        result = action()
    except Exception as error:
        own_error = error
    message = "" if own_error is None else f"{type(own_error).__name__}: {own_error}"
    messages = all_gather_text(message)
    if own_error is not None:
        raise own_error
    for number, failure in enumerate(messages):
        if failure:
            raise RankError(f"process {number}: {failure}")
    return result


def on_first_rank(action: Callable[[], T]) -> T | None:
    """Run ``action`` in the first process while the others wait.

    Returns:
        The result in the first process, None in the others.

    Raises:
        RankError: In the other processes, if it failed in the first.
    """
    return on_all_ranks(lambda: action() if rank() == 0 else None)
