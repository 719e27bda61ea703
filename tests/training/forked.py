"""Processes of a run, forked from the test."""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401 - imported once, not in every process
import torch
import torch._dynamo
import torch._inductor.codecache
import torch._inductor.config
import torch.distributed as dist
import torch.distributed.checkpoint


def run_ranks(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``work(*arguments)`` in ``count`` processes of one process group.

    Returns:
        The results in rank order; for an exception, its type and message.
    """
    context = multiprocessing.get_context("fork")
    meeting = folder / f"meeting-{os.urandom(8).hex()}"
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, count, meeting, queue, work, arguments))
        for rank in range(count)
    ]
    with _fork_beside_threads():
        for process in processes:
            process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(count)]


def start(work: Callable[..., Any], *arguments: Any) -> int:
    """Call ``work(*arguments)`` in a new process; returns its process id.

    It ends with status 0, or 1 where ``work`` raised.
    """
    with _fork_beside_threads():
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        _compile_alone()
        work(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # skips the exit handlers of the test process


@contextmanager
def _fork_beside_threads() -> Iterator[None]:
    # Python 3.12 warns about PyTorch's threads; none of them holds a lock that a child needs.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _compile_alone() -> None:
    """Let Inductor compile in this thread, because a fork does not copy the threads of its pool."""
    torch._inductor.config.compile_threads = 1


def start_ranks(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[int]:
    """Call ``work(*arguments)`` in processes of one process group; returns their process ids."""
    meeting = folder / f"meeting-{os.urandom(8).hex()}"
    return [start(_join, rank, count, meeting, work, arguments) for rank in range(count)]


def _rank(rank: int, count: int, meeting: Path, queue: Any, work: Any, arguments: Any) -> None:
    try:
        _compile_alone()
        result = _join(rank, count, meeting, work, arguments)
    except BaseException as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    queue.put((rank, result))
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank: int, count: int, meeting: Path, work: Any, arguments: Any) -> Any:
    torch.set_num_threads(1)
    # As torchrun sets them.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ["TORCHELASTIC_RUN_ID"] = meeting.name
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    return work(*arguments)
