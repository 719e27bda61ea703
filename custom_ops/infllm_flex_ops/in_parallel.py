"""Run the parts of a definition on several threads, one thread per part; no operator itself.

PyTorch parallelises every operation by itself, and its threads wait for each other after each one.
A part of a few milliseconds has thousands of such waits, each as long as the busiest core takes.
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

    The bits do not depend on the number of threads, because each operation runs on one of them.

    Args:
        function: Runs without gradients, for several parts at the same time.
        parts: Taken as threads become free.
        finish: Called with the results one after another, in the order of the parts.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        for part in parts:
            result = function(part)
            if finish is not None:
                finish(result)
        return
    is_inference = torch.is_inference_mode_enabled()  # modes belong to a thread

    def run(part: _Part, before: Future[None] | None) -> None:
        with torch.inference_mode() if is_inference else torch.no_grad():
            result = function(part)
            if finish is not None:
                if before is not None:
                    before.result()  # began earlier, so that no two wait for each other
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
        for one in running:  # not empty only after an error
            one.cancel()


@functools.cache
def _workers(num_threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="infllm_flex")
    barrier = threading.Barrier(num_threads + 1)

    def settle() -> None:
        torch.get_num_threads()  # the first call in a thread sets its number; set it after that
        torch.set_num_threads(1)  # of this thread
        barrier.wait()

    for _ in range(num_threads):
        pool.submit(settle)
    barrier.wait()
    torch.set_num_threads(num_threads)  # of this thread, and of later ones
    return pool


# A forked process inherits the pool without its threads.
os.register_at_fork(after_in_child=_workers.cache_clear)
