"""What processes of a run tell one another while they write and read the same folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class RankError(RuntimeError):
    """Another process of the run failed, and said why."""


def rank() -> int:
    """The place of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(text: str) -> list[str]:
    """The text of every process, in order. All must ask."""
    if num_ranks() == 1:
        return [text]
    mine = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(num_ranks())]
    dist.all_gather(sizes, torch.tensor(len(text.encode())))
    longest = max(1, *map(int, sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(mine)] = mine
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return [
        bytes(part[: int(size)].tolist()).decode() for part, size in zip(found, sizes, strict=True)
    ]


def everywhere(action: Callable[[], T]) -> T:
    """Run ``action`` in every process; where it fails in one, it fails in all.

    Raises:
        RankError: It failed in another process only.
    """
    mine: Exception | None = None
    try:
        result = action()
    except Exception as error:
        mine = error
    failures = gather("" if mine is None else f"{type(mine).__name__}: {mine}")
    if mine is not None:
        raise mine
    for number, failure in enumerate(failures):
        if failure:
            raise RankError(f"process {number}: {failure}")
    return result


def on_first(action: Callable[[], T]) -> T | None:
    """Run ``action`` in the first process while the others wait.

    Returns:
        Its result in the first process, None in the others.

    Raises:
        RankError: In the others, where it failed.
    """
    return everywhere(lambda: action() if rank() == 0 else None)
