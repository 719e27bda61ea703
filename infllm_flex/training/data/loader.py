"""Batches of a stage in order, made beside the training by as many processes as are wanted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from infllm_flex.training.data.batch import Batch
from infllm_flex.training.data.sampler import Sampler

_AHEAD = 4  # batches that each worker makes before they are asked for


def batches(
    sampler: Sampler,
    batch_size: int,
    first: int,
    last: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This process's part of each step's samples.

    Which samples a step has depends on ``batch_size`` alone, not on how many processes share it,
    nor on where the run was resumed.

    Args:
        sampler: Of the stage.
        batch_size: Samples of a step, over all processes. A multiple of ``ranks``.
        first: Step of the stage to begin with.
        last: Step to end before.
        rank: This process, among those that see different samples.
        ranks: How many of those there are.
        workers: Processes to start; 0 makes each batch when it is asked for.
        pin_memory: Whether to put batches where a GPU copies them from fastest.

    Raises:
        ValueError: ``batch_size`` cannot be shared evenly.
    """
    if batch_size % ranks:
        raise ValueError(f"batch_size must be a multiple of the {ranks} processes that share it")
    share = batch_size // ranks
    loader = DataLoader(
        _Samples(sampler, last * batch_size),
        batch_sampler=_Shares(range(first, last), batch_size, rank * share, share),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=_AHEAD if workers else None,
        worker_init_fn=_leave_interrupts_to_the_training,
        # It would draw from the global generator otherwise, at a resume too.
        generator=torch.Generator(),
    )
    return iter(loader)


class _Samples(Dataset[Batch]):
    def __init__(self, sampler: Sampler, size: int) -> None:
        self._sampler, self._size = sampler, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Batch:
        return self._sampler.batch([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        return self._sampler.batch(indices)


class _Shares(torch.utils.data.Sampler[list[int]]):
    """The samples of each step that are this process's."""

    def __init__(self, steps: range, batch_size: int, offset: int, share: int) -> None:
        self._steps, self._batch_size, self._offset, self._share = steps, batch_size, offset, share

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            start = step * self._batch_size + self._offset
            yield list(range(start, start + self._share))


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_the_training(worker: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach every process; the training decides when to stop, and
    # a worker that misses it for five seconds ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
