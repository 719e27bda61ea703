"""Which layers attend densely because of a ``dense`` block: those of the thread that opened it.

A layer that a checkpoint recomputes in a backward pass does what it did in its forward, whichever
thread runs the backward pass, and whatever block is open there. The node that the backward pass is
at tells: PyTorch numbers the nodes of each thread in turn, so a block made those numbered while it
was open. This holds for all kinds of checkpoints, which all recompute at a node of the forward.

In compiled code nothing can be asked but the thread's own state, which Dynamo guards.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

_NEAR = 512  # nodes: more than a layer makes
_FORWARD = -1  # what PyTorch numbers the backward pass of a thread that runs none
_REMEMBERED = 4096  # blocks, and sparse calls of a thread, whose graphs may still be alive


class DenseBlocks(threading.local):
    """The blocks that one layer is inside, in each thread.

    Attributes:
        depth: Number of open blocks; Dynamo reads it in the thread that calls.
        backwards: For each of them the number of the backward pass that it was opened in.
        is_worker: Whether the thread is PyTorch's own, one that runs backward passes.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.backwards: list[int] = []
        self.is_worker = isinstance(threading.current_thread(), threading._DummyThread)


class Switchable:
    """What can be inside of blocks: the record of a layer.

    Attributes:
        blocks: Its open blocks.
        num_blocks: Their number in all threads.
    """

    blocks: DenseBlocks
    num_blocks: int

    def is_inside_block(self) -> bool:
        """Whether a block makes the layer attend densely where this is called."""
        blocks = self.blocks
        if torch.compiler.is_compiling():
            # PyTorch's threads open no blocks, but recompute for those that do.
            return blocks.depth > 0 or (blocks.is_worker and self.num_blocks > 0)
        backward = torch._C._current_graph_task_id()
        if backward == _FORWARD:
            if blocks.depth == 0:
                _note_sparse_call()
            return blocks.depth > 0
        return backward in blocks.backwards or _was_inside_block(self)


class _Block:
    """A block, and the nodes that were made in it.

    Attributes:
        members: The layers that it makes dense.
        thread: The thread that opened it.
        first: Number of its first node.
        end: Number of the first node after it; None while it is open.
    """

    def __init__(self, members: tuple[Switchable, ...]) -> None:
        self.members = members
        self.thread = threading.get_ident()
        self.first = _next_node()
        self.end: int | None = None

    def holds(self, node: int, layer: Switchable) -> bool:
        inside = self.first <= node and (self.end is None or node < self.end)
        return inside and any(member is layer for member in self.members)


class _SparseCalls(threading.local):
    def __init__(self) -> None:
        self.nodes: deque[int] = deque(maxlen=_REMEMBERED)


_lock = threading.Lock()
_blocks: deque[_Block] = deque(maxlen=_REMEMBERED)
_sparse_calls = _SparseCalls()


@contextmanager
def inside_block(layers: Iterable[Switchable]) -> Iterator[None]:
    """Make layers attend densely in this thread, inside the block.

    Args:
        layers: Their records.
    """
    block = _Block(tuple(layers))
    backward = torch._C._current_graph_task_id()
    with _lock:
        _blocks.append(block)
        for layer in block.members:
            layer.num_blocks += 1
    for layer in block.members:
        layer.blocks.depth += 1
        layer.blocks.backwards.append(backward)
    try:
        yield
    finally:
        block.end = _next_node()
        for layer in block.members:
            layer.blocks.depth -= 1
            layer.blocks.backwards.pop()
        with _lock:
            for layer in block.members:
                layer.num_blocks -= 1
            if block.end == block.first and block in _blocks:  # no graph was made
                _blocks.remove(block)


def _next_node() -> int:
    return torch._C._autograd._get_sequence_nr()


def _note_sparse_call() -> None:
    node, nodes = _next_node(), _sparse_calls.nodes
    if not nodes or nodes[-1] != node:
        nodes.append(node)


def _was_inside_block(layer: Switchable) -> bool:
    """Whether the forward that is being recomputed was inside a block."""
    node = torch._C._current_autograd_node()
    if node is None:
        return False
    number = node._sequence_nr()
    with _lock:
        threads = {block.thread for block in _blocks if block.holds(number, layer)}
    # Each thread counts for itself. If this one made a node of that number, it means its own.
    return threading.get_ident() in threads or (bool(threads) and not _made_here(number))


def _made_here(node: int) -> bool:
    """Whether this thread called a sparse layer about when a node was made."""
    nodes = list(_sparse_calls.nodes)
    at = bisect_left(nodes, node - _NEAR)
    return at < len(nodes) and nodes[at] <= node + _NEAR
