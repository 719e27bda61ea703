"""The batches of a stage in order, prepared by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from infllm_flex.training.data.batch import Batch
from infllm_flex.training.data.sampler import Sampler

_PREFETCHED = 4  # batches per worker


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
    """Iterate over this process's samples of each step.

    The samples of a step depend on ``batch_size`` alone, not on the number of processes or on
    where the run was resumed.

    Args:
        sampler: Sampler of the stage.
        batch_size: Samples of a step over all processes, a multiple of ``ranks``.
        first: First step.
        last: Step after the last.
        rank: Rank of this process among those with different samples.
        ranks: Number of processes with different samples.
        workers: Number of worker processes; 0 makes each batch in this process.
        pin_memory: Whether to return batches in page-locked memory.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``ranks``.
    """
    if batch_size % ranks:
        raise ValueError(f"batch_size must be a multiple of the {ranks} ranks, got {batch_size}")
    samples_per_rank = batch_size // ranks
    offset = rank * samples_per_rank
    loader = DataLoader(
        _Samples(sampler, last * batch_size),
        batch_sampler=_RankSamples(range(first, last), batch_size, offset, samples_per_rank),
        num_workers=workers,
        collate_fn=_return_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=_PREFETCHED if workers else None,
        worker_init_fn=_ignore_stop_signals,
        # Without its own generator, the loader would draw from the global one and change a resumed
        # run.
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


class _RankSamples(torch.utils.data.Sampler[list[int]]):
    """The indices of this process's samples of each step."""

    def __init__(self, steps: range, batch_size: int, offset: int, count: int) -> None:
        self._steps, self._batch_size, self._offset, self._count = steps, batch_size, offset, count

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            start = step * self._batch_size + self._offset
            yield list(range(start, start + self._count))


def _return_unchanged(batch: Any) -> Any:
    return batch


def _ignore_stop_signals(worker: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach every process, but the training process decides when to
    # stop. A worker whose parent is gone ends by itself within five seconds.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
