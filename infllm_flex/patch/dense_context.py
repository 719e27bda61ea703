"""The ``dense`` context: layers attend densely in the thread that opened it.

A checkpointed layer that is recomputed in a backward pass does what it did in its forward,
whichever thread runs the backward pass and whatever context is open there. The autograd node tells:
PyTorch numbers the nodes of each thread in order, so a context owns the numbers given while it was
open. This holds for all kinds of checkpoints, because all of them recompute at a forward's node.

Compiled code can only ask for the thread's own state, which Dynamo guards.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from infllm_flex_ops import torch_private

_NEAR = 512  # nodes: more than one layer makes
_FORWARD = -1  # PyTorch's id of the backward pass where none runs
_REMEMBERED = 4096  # contexts, and sparse calls of a thread, whose graphs may still be alive


class OpenContexts(threading.local):
    """The dense contexts that one layer is in, per thread.

    Attributes:
        depth: Number of open contexts. Dynamo reads it in the thread that calls.
        backwards: For each context the id of the backward pass in which it was opened.
        is_worker: Whether the thread is one of PyTorch's own, which run backward passes.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.backwards: list[int] = []
        self.is_worker = isinstance(threading.current_thread(), threading._DummyThread)


class DenseSwitch:
    """Base of a layer's record: knows whether a dense context holds where it is asked.

    Attributes:
        open_contexts: The contexts that the layer is in.
        num_contexts: Their number in all threads.
    """

    open_contexts: OpenContexts
    num_contexts: int

    def is_in_dense_context(self) -> bool:
        """Whether a context makes the layer attend densely here."""
        contexts = self.open_contexts
        if torch.compiler.is_compiling():
            # PyTorch's threads open no contexts, but recompute for threads that do.
            return contexts.depth > 0 or (contexts.is_worker and self.num_contexts > 0)
        backward = torch_private.current_backward()
        if backward == _FORWARD:
            if contexts.depth == 0:
                _note_sparse_call()
            return contexts.depth > 0
        return backward in contexts.backwards or _was_in_dense_context(self)


class _Context:
    """A dense context, and the autograd nodes that were made in it.

    Attributes:
        layers: The layers that it makes dense.
        thread: The thread that opened it.
        first_node: Number of its first node.
        end_node: Number of the first node after it; None while it is open.
    """

    def __init__(self, layers: tuple[DenseSwitch, ...]) -> None:
        self.layers = layers
        self.thread = threading.get_ident()
        self.first_node = _next_node()
        self.end_node: int | None = None

    def covers(self, node: int, layer: DenseSwitch) -> bool:
        inside = self.first_node <= node and (self.end_node is None or node < self.end_node)
        return inside and any(own is layer for own in self.layers)


class _SparseCalls(threading.local):
    def __init__(self) -> None:
        self.nodes: deque[int] = deque(maxlen=_REMEMBERED)


_lock = threading.Lock()
_contexts: deque[_Context] = deque(maxlen=_REMEMBERED)
_sparse_calls = _SparseCalls()


@contextmanager
def dense_context(layers: Iterable[DenseSwitch]) -> Iterator[None]:
    """Make layers attend densely in this thread, inside the context.

    Args:
        layers: Their records.
    """
    context = _Context(tuple(layers))
    backward = torch_private.current_backward()
    with _lock:
        _contexts.append(context)
        for layer in context.layers:
            layer.num_contexts += 1
    for layer in context.layers:
        layer.open_contexts.depth += 1
        layer.open_contexts.backwards.append(backward)
    try:
        yield
    finally:
        context.end_node = _next_node()
        for layer in context.layers:
            layer.open_contexts.depth -= 1
            layer.open_contexts.backwards.pop()
        with _lock:
            for layer in context.layers:
                layer.num_contexts -= 1
            made_no_graph = context.end_node == context.first_node
            if made_no_graph and context in _contexts:
                _contexts.remove(context)


def _next_node() -> int:
    return torch_private.next_node_number()


def _note_sparse_call() -> None:
    node, nodes = _next_node(), _sparse_calls.nodes
    if not nodes or nodes[-1] != node:
        nodes.append(node)


def _was_in_dense_context(layer: DenseSwitch) -> bool:
    """Whether the forward that is being recomputed was in a dense context."""
    number = torch_private.current_node_number()
    if number is None:
        return False
    with _lock:
        threads = {context.thread for context in _contexts if context.covers(number, layer)}
    # Each thread has its own numbers. If this thread made a node of that number, it is that one.
    return threading.get_ident() in threads or (bool(threads) and not _made_here(number))


def _made_here(node: int) -> bool:
    """Whether this thread called a sparse layer about when the node was made."""
    nodes = list(_sparse_calls.nodes)
    at = bisect_left(nodes, node - _NEAR)
    return at < len(nodes) and nodes[at] <= node + _NEAR
