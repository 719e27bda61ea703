"""Run the parts of a definition on several threads, each part on one; no operator itself.

PyTorch splits every operation on its own, and its threads spin where they meet: parts of a few
milliseconds make thousands of such meetings, each as long as the busiest core lets it wait.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


def in_parallel(
    function: Callable[[_Part], _Result],
    parts: Iterable[_Part],
    finish: Callable[[_Result], None] | None = None,
) -> None:
    """Call ``function`` on each part, on as many threads as PyTorch has.

    The bits do not depend on how many there are, since no operation is shared by several.

    Args:
        function: Without gradients; parts may run at the same time.
        parts: Taken as threads become free.
        finish: Called with the results one after the other, in the order of the parts.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        for part in parts:
            result = function(part)
            if finish is not None:
                finish(result)
        return
    is_inference = torch.is_inference_mode_enabled()  # a mode of the thread, as the next two are

    def run(part: _Part, before: Future[None] | None) -> None:
        with torch.inference_mode() if is_inference else torch.no_grad():
            result = function(part)
            if finish is not None:
                if before is not None:
                    before.result()  # it began earlier, so that the first never waits
                finish(result)

    pool = _workers(num_threads)
    running: deque[Future[None]] = deque()
    last: Future[None] | None = None
    try:
        for part in parts:
            last = pool.submit(run, part, last)
            running.append(last)
            if len(running) > 2 * num_threads:
                running.popleft().result()
        while running:
            running.popleft().result()
    finally:
        for one in running:  # after an error
            one.cancel()


@functools.cache
def _workers(num_threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="infllm_flex")
    barrier = threading.Barrier(num_threads + 1)

    def settle() -> None:
        torch.get_num_threads()  # gives a new thread the number of all, once
        torch.set_num_threads(1)  # that of this thread
        barrier.wait()

    for _ in range(num_threads):
        pool.submit(settle)
    barrier.wait()
    torch.set_num_threads(num_threads)  # of this thread, and of threads to come
    return pool


# A forked process has the pool, but not its threads.
os.register_at_fork(after_in_child=_workers.cache_clear)
