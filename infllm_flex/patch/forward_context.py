"""One forward of a model: what it was given, and what its layers found out about that.

All layers of a forward ask the same questions about the same batch, and some never receive the
positions that the model was given. Hooks on the models inside (a causal LM, its base) record both.
Nothing is kept from one forward to the next, because no counter shows every change of a tensor:
collectives, numpy and ``.data`` bypass it. `infllm_flex.patch.forward_hooks` has the hooks.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from infllm_flex.patch.host_read import HostRead
from infllm_flex_ops import torch_private

_Answer = TypeVar("_Answer")
_ATTRIBUTE = "infllm_forward"


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


class ForwardContext:
    """A forward that is running, or whose layers are recomputed in the backward pass.

    PyTorch does not call the hook that ends a forward after a KeyboardInterrupt and its like. A
    forward that was left so stays in its thread until `drop_ended_forwards`; it holds no model and
    no cache.

    Attributes:
        enclosing: The forward that it is part of.
        previous: The forward that its thread goes back to.
        code: The code that called the hook with which it began; None where that is unknown.
        inner_hooks: Numbers of the hooks of the models inside ``owner``.
        owner_ref: Returns ``owner``.
        positions: The text's ``position_ids`` as the caller gave them, ``[1 or B, S]``; None where
            the model makes its own.
        bounds: ``cu_seq_lens_q`` as the caller gave them.
        num_documents: The most documents that a row of ``positions`` holds, where their count was
            begun with the forward (`begin_count`).
        counts_up: Whether the model is known to make positions that only count up.
        sparse_from: Least number of tokens at which a layer of ``owner`` is sparse.
        is_recomputable: Whether a backward pass may run its layers again.
        is_traced: Whether it began inside a graph, which then holds all answers of its own.
        layers: Ids of the layers that have asked, in a model without hooks.
    """

    def __init__(
        self,
        owner: nn.Module | None = None,
        enclosing: ForwardContext | None = None,
        positions: Tensor | None = None,
        bounds: Tensor | None = None,
        counts_up: bool = False,
        cache: object = None,
        sparse_from: int = 0,
    ) -> None:
        if positions is None and enclosing is not None:
            positions = enclosing.positions
        if bounds is None and enclosing is not None:
            bounds = enclosing.bounds
        self.owner_ref = _nothing if owner is None else weakref.ref(owner)
        self._cache = _nothing if cache is None else _weakly(cache)
        self.enclosing = enclosing
        self.previous = enclosing
        self.code: CodeType | None = None
        self.inner_hooks: frozenset[int] = frozenset()
        self.positions: Tensor | None = positions
        self.bounds: Tensor | None = bounds
        self.num_documents: HostRead | None = None
        self.counts_up = counts_up and positions is None
        self.sparse_from = sparse_from
        self.is_recomputable = torch.is_grad_enabled()
        self.is_traced = torch.compiler.is_compiling()
        self.layers: set[int] = set()
        self._answers: dict[tuple[Any, ...], tuple[list[Any], Any]] = {}
        self._answers_in_graph: list[tuple[object, Tensor, Any]] = []

    @property
    def owner(self) -> nn.Module | None:
        """The module whose forward it is; None in a model without hooks."""
        return self.owner_ref()

    @property
    def cache(self) -> Any:
        """The cache that the caller gave to ``owner``; None for one that ``owner`` makes, empty."""
        return self._cache()

    def begin_count(self) -> None:
        """Begin to count the documents of ``positions``, once for a model and those inside it.

        The first layer asks for the number. Until then the host launches all that comes before it,
        and the device does not idle while the host waits.
        """
        outer, positions = self.enclosing, self.positions
        if positions is None:
            return
        if outer is not None and outer.num_documents is not None:
            assert outer.positions is not None
            if _are_same_memory(outer.positions, positions):
                self.num_documents = outer.num_documents
        if self.num_documents is None:
            self.num_documents = HostRead(count_documents(positions))

    def recall(
        self, question: object, tensors: tuple[Tensor | None, ...], answer: Callable[[], _Answer]
    ) -> _Answer:
        """The answer to a question about some tensors, computed once per forward.

        Args:
            question: Key of the question.
            tensors: The tensors that it is about, by identity.
            answer: Computes the answer.
        """
        key = (question, *map(id, tensors))
        known = self._answers.get(key)
        if known is not None and all(ref() is x for ref, x in zip(known[0], tensors, strict=True)):
            return cast(_Answer, known[1])
        new = answer()
        # Weak references, because the tensors hold this object.
        self._answers[key] = ([_nothing if x is None else weakref.ref(x) for x in tensors], new)
        self.mark(*tensors)
        return new

    def recall_in_graph(
        self, question: object, tensor: Tensor, answer: Callable[[], _Answer]
    ) -> _Answer:
        """The same while a graph is traced that holds the whole forward.

        No tensor is marked: a mark on an input of the graph would outlive the forward.
        """
        for known_question, known, result in self._answers_in_graph:
            if known is tensor and known_question == question:
                return cast(_Answer, result)
        new = answer()
        self._answers_in_graph.append((question, tensor, new))
        return new

    def mark(self, *tensors: object) -> None:
        """Attach this forward to tensors and masks, so that recomputed layers find it."""
        if not self.is_recomputable:
            return
        for x in tensors:
            if x is not None:
                setattr(x, _ATTRIBUTE, self)

    def __reduce__(self) -> tuple[Any, ...]:
        # A tensor that is copied or saved loses its forward.
        return _nothing, ()


def count_documents(positions: Tensor) -> Tensor:
    """Count the documents of the row that has most of them: int64 ``[]``.

    A document begins where positions go back. In a row where they do, 0 after 0 begins one, too.

    Args:
        positions: ``[B, S]``, of rows without padding.
    """
    step = positions.diff(dim=-1)
    back = step < 0
    zero_again = (positions[:, 1:] == 0) & (step == 0)
    return ((back | zero_again).sum(-1) * back.any(-1)).max() + 1


def _are_same_memory(x: Tensor, y: Tensor) -> bool:
    same_place = x.data_ptr() == y.data_ptr() and x.device == y.device
    return same_place and x.shape == y.shape and x.stride() == y.stride()


def _nothing() -> None:
    return None


def _weakly(x: Any) -> Callable[[], Any]:
    """A function that returns ``x`` as long as others hold it."""
    try:
        return weakref.ref(x)
    except TypeError:  # a tuple, for example
        return lambda: x


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
            forward = getattr(x, _ATTRIBUTE, None)
            if forward is not None:
                return cast(ForwardContext, forward)
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
