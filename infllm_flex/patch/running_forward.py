"""Which forward runs in this thread, and what it has found out.

Layers ask here: once for a forward where one is known, and anew each time where none is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor

from infllm_flex.patch.forward_context import ForwardContext, marked_forward
from infllm_flex_ops import torch_private

_Answer = TypeVar("_Answer")


class _Running:
    """The forwards of one thread.

    An object of its own, because Dynamo loses what is stored in a ``threading.local`` itself when a
    graph breaks.
    """

    def __init__(self) -> None:
        self.forward: ForwardContext | None = None
        self.recomputed: ForwardContext | None = None
        self.unhooked: ForwardContext | None = None


class _Threads(threading.local):
    def __init__(self) -> None:
        # Set in every thread from the start: a graph of one thread serves all others.
        self.running = _Running()


_threads = _Threads()


def set_current_forward(forward: ForwardContext | None) -> None:
    """Begin a forward in this thread, or go back to the enclosing one."""
    _threads.running.forward = forward


def current_forward() -> ForwardContext | None:
    """The innermost forward that runs in this thread."""
    return _threads.running.forward


def drop_ended_forwards(frame: FrameType | None) -> None:
    """Forget the forwards of this thread that a KeyboardInterrupt, or its like, has ended.

    Args:
        frame: The innermost frame of the stack on which forwards may be running.
    """
    running = _threads.running
    forward = running.forward
    while forward is not None and forward.code is not None and forward is not running.recomputed:
        owner = forward.owner_ref()
        if owner is not None and torch_private.is_being_called(owner, forward.code, frame):
            break
        forward = forward.previous
    running.forward = forward


def enclosing_forward(hook: int) -> ForwardContext | None:
    """The innermost forward around the model whose forward begins.

    A graph, and what follows it after a graph break, cannot see which forwards have ended. There
    the forward of a model around this one is taken to be running.

    Args:
        hook: Number of the model's hook.
    """
    forward = _threads.running.forward
    compiling = torch.compiler.is_compiling()
    while forward is not None and hook not in forward.inner_hooks:
        if not compiling and forward.code is not None:
            break  # `drop_ended_forwards` has seen it run
        forward = forward.previous
    return forward


class RecomputedForward:
    """Context manager in which the forward that runs now runs again, to recompute its layers.

    For the ``context_fn`` of ``torch.utils.checkpoint``: a compiled layer asks the running forward,
    and without it would be recomputed by another graph. It can be entered more than once.
    """

    def __init__(self) -> None:
        self._forward = current_forward()
        self._before: list[tuple[ForwardContext | None, ForwardContext | None]] = []

    def __enter__(self) -> None:
        running = _threads.running
        self._before.append((running.forward, running.recomputed))
        running.forward = running.recomputed = self._forward

    def __exit__(self, *error: object) -> None:
        running = _threads.running
        running.forward, running.recomputed = self._before.pop()


def is_backward() -> bool:
    """Whether this thread is inside a backward pass, for example to recompute a layer."""
    if torch.compiler.is_compiling():
        return False
    return torch_private.current_backward() != -1


def begin_unhooked_forward() -> None:
    """Assume that the layers that ask next belong to one forward, in a model without hooks.

    A model that only names us as its attn_implementation has no hooks, but makes its masks before
    its layers run.
    """
    if torch.compiler.is_compiling():
        return
    if _threads.running.forward is not None:
        drop_ended_forwards(sys._getframe())
    if _threads.running.forward is None:
        _threads.running.unhooked = ForwardContext()


def forward_of(tensors: tuple[object, ...], layer: object = None) -> ForwardContext | None:
    """The forward to which a layer's call belongs: the running or the recomputed one.

    Args:
        tensors: The layer's arguments. A checkpoint keeps them, and they hold their forward.
        layer: The layer that asks. In a model without hooks, a layer that asks again is in another
            forward.
    """
    if is_backward():
        for x in tensors:
            if (forward := marked_forward(x)) is not None:
                return forward
    if current_forward() is not None and not torch.compiler.is_compiling():
        drop_ended_forwards(sys._getframe())
    running = current_forward()
    if running is not None or layer is None or torch.compiler.is_compiling():
        return running
    unhooked = _threads.running.unhooked
    if unhooked is None or id(layer) in unhooked.layers:
        _threads.running.unhooked = None
        return None
    unhooked.layers.add(id(layer))
    return unhooked


def recall(
    question: object, tensors: tuple[Tensor | None, ...], answer: Callable[[], _Answer]
) -> _Answer:
    """As `ForwardContext.recall`; outside any forward, the answer is computed anew each time."""
    forward = forward_of(tensors)
    return answer() if forward is None else forward.recall(question, tensors, answer)


def recall_on_device(question: object, tensor: Tensor, answer: Callable[[], _Answer]) -> _Answer:
    """Recall an answer that stays on the device, in eager code and in graphs.

    A graph of one layer computes its own answer: what another graph returned may lie in memory that
    is used again.
    """
    forward = current_forward()
    if forward is None:
        return answer()
    if not torch.compiler.is_compiling():
        return forward.recall(question, (tensor,), answer)
    return forward.recall_in_graph(question, tensor, answer) if forward.is_traced else answer()


def is_first_to_ask(question: object, tensor: Tensor) -> bool:
    """Whether no other layer of the running forward has asked this about a tensor.

    True wherever that is unknown: outside any forward, in a graph of one layer, and in a graph for
    training, which may recompute layers apart from each other and computes equal answers once.
    """
    forward = current_forward()
    if forward is None or (forward.is_recomputable and torch.compiler.is_compiling()):
        return True
    askers: list[None] = recall_on_device(question, tensor, list)
    askers.append(None)
    return len(askers) == 1
