"""One forward of a model: what it was given, and what its layers found out about that.

All layers of a forward ask the same questions about the same batch, and some never receive the
positions that the model was given. Hooks on the models inside (a causal LM, its base) record both.
Nothing is kept from one forward to the next, because no counter shows every change of a tensor:
collectives, numpy and ``.data`` bypass it. `infllm_flex.patch.forward_hooks` has the hooks, and
`infllm_flex.patch.running_forward` says which forward runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from infllm_flex.patch.host_read import HostRead

_Answer = TypeVar("_Answer")
_ATTRIBUTE = "infllm_forward"


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


def marked_forward(x: object) -> ForwardContext | None:
    """The forward that `ForwardContext.mark` attached to a tensor or mask."""
    return getattr(x, _ATTRIBUTE, None)


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
