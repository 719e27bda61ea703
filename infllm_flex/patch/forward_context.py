"""One forward of a model: what it was given, and what its layers found out about that.

All layers of a forward ask the same questions about the same batch, and some are never told the
positions that the model was given. Hooks on the models inside (a causal LM, its base) note both.
Nothing is remembered from one forward to the next: no counter tells whether a tensor was changed by
a collective, by numpy or through ``.data``.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

_Answer = TypeVar("_Answer")
_GIVEN = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
_ATTRIBUTE = "infllm_forward"


class _Running(threading.local):
    def __init__(self) -> None:
        # There in every thread from the start: a graph of one thread serves all others.
        self.forward: ForwardContext | None = None
        self.masked: ForwardContext | None = None


_running = _Running()


class ForwardContext:
    """A forward that is running, or whose layers are recomputed in the backward pass.

    Attributes:
        owner: The module whose forward it is; None where only its masks were seen.
        enclosing: The forward that it is part of.
        positions: The text's ``position_ids`` as the caller gave them, ``[1 or B, S]``; None where
            the model makes its own.
        bounds: ``cu_seq_lens_q`` as the caller gave them.
        counts_up: Whether the model is known to make positions that only count up.
        layers: Ids of those that have asked, where only masks were seen.
    """

    def __init__(
        self,
        owner: nn.Module | None = None,
        enclosing: ForwardContext | None = None,
        positions: Tensor | None = None,
        bounds: Tensor | None = None,
        counts_up: bool = False,
    ) -> None:
        if positions is None and enclosing is not None:
            positions = enclosing.positions
        if bounds is None and enclosing is not None:
            bounds = enclosing.bounds
        self.owner = owner
        self.enclosing = enclosing
        self.positions: Tensor | None = positions
        self.bounds: Tensor | None = bounds
        self.counts_up = counts_up and positions is None
        self.layers: set[int] = set()
        self._answers: dict[tuple[Any, ...], tuple[list[Any], Any]] = {}

    def recall(
        self, question: object, tensors: tuple[Tensor | None, ...], answer: Callable[[], _Answer]
    ) -> _Answer:
        """The answer to a question about some tensors, found once.

        Args:
            question: What is asked.
            tensors: What it is asked about, by identity.
            answer: Finds the answer.
        """
        key = (question, *map(id, tensors))
        known = self._answers.get(key)
        if known is not None and all(ref() is x for ref, x in zip(known[0], tensors, strict=True)):
            return cast(_Answer, known[1])
        new = answer()
        # Weak references: the tensors carry this object.
        self._answers[key] = ([_nothing if x is None else weakref.ref(x) for x in tensors], new)
        self.mark(*tensors)
        return new

    def mark(self, *tensors: object) -> None:
        """Let tensors, and masks, carry this forward to where their layers are recomputed."""
        for x in tensors:
            if x is not None:
                setattr(x, _ATTRIBUTE, self)

    def __reduce__(self) -> tuple[Any, ...]:
        # A tensor that is copied or saved leaves its forward behind.
        return _nothing, ()


def _nothing() -> None:
    return None


def current_forward() -> ForwardContext | None:
    """The innermost forward that runs in this thread."""
    return _running.forward


def is_backward() -> bool:
    """Whether this thread is inside a backward pass, say to recompute a checkpointed layer."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def begin_unhooked_forward() -> None:
    """Take the layers that ask next for those of one forward, in a model that has no hooks.

    A model that only names us as its attn_implementation never came by here, but makes its masks
    before its layers run.
    """
    if current_forward() is None and not torch.compiler.is_compiling():
        _running.masked = ForwardContext()


def forward_of(tensors: tuple[object, ...], layer: object = None) -> ForwardContext | None:
    """The forward in which a layer is asked: the running one, or the one that is recomputed.

    Args:
        tensors: What the layer was given: a checkpoint keeps it, and it carries its forward.
        layer: Who asks. Where only masks were seen, one that asks again is in another forward.
    """
    if is_backward():
        for x in tensors:
            forward = getattr(x, _ATTRIBUTE, None)
            if forward is not None:
                return cast(ForwardContext, forward)
    running = current_forward()
    if running is not None or layer is None or torch.compiler.is_compiling():
        return running
    masked = _running.masked
    if masked is None or id(layer) in masked.layers:
        _running.masked = None
        return None
    masked.layers.add(id(layer))
    return masked


def recall(
    question: object, tensors: tuple[Tensor | None, ...], answer: Callable[[], _Answer]
) -> _Answer:
    """As `Forward.recall`; outside any forward, the answer is found anew each time."""
    forward = forward_of(tensors)
    return answer() if forward is None else forward.recall(question, tensors, answer)


def install_forward_hooks(model: nn.Module) -> None:
    """Have every forward of ``model``, and of the models inside it, noted."""
    remove_forward_hooks(model)
    for module in model.modules():
        names = _arguments(module)
        if "position_ids" in names:
            opening = functools.partial(_open, names, _is_of_transformers(module))
            module.register_forward_pre_hook(opening, with_kwargs=True)
            module.register_forward_hook(_close, always_call=True)


def remove_forward_hooks(model: nn.Module) -> None:
    """Undo `install_forward_hooks`. By the hooks: a copied model has them, but no handles."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, functools.partial) and hook.func is _open:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, after in list(module._forward_hooks.items()):
            if after is _close:
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """What the forward of a transformers model takes, in order; nothing for other modules.

    Layers have no forward of their own here: they may be recomputed where no model runs.
    """
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__):
        return ()
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _is_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _open(
    names: tuple[str, ...],
    is_known: bool,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    positions = given.get("position_ids")
    # The models of transformers make positions that count up, unless another hook brings some.
    counts_up = is_known and positions is None and len(module._forward_pre_hooks) == 1
    _running.forward = ForwardContext(
        module, current_forward(), _of_text(positions), given.get("cu_seq_lens_q"), counts_up
    )
    if torch.compiler.is_compiling():
        return None
    # Tensors of this forward's own, by which layers that are recomputed later find it.
    named = zip(names, args, strict=False)
    args = (*(_own(name, x) for name, x in named), *args[len(names) :])
    return args, {name: _own(name, x) for name, x in kwargs.items()}


def _of_text(positions: Any) -> Tensor | None:
    """Positions as ``[1 or B, S]``: the first of several axes."""
    if not isinstance(positions, Tensor) or not 0 < positions.dim() < 4:
        return None
    if positions.dim() == 1:
        return positions[None]
    # Over images: the text's, or those in time, which go back only where the text does.
    return positions[0] if positions.dim() == 3 else positions


def _own(name: str, value: Any) -> Any:
    return value.view_as(value) if name in _GIVEN and isinstance(value, Tensor) else value


def _close(module: nn.Module, args: Any, output: Any) -> None:
    forward = current_forward()
    if forward is not None and forward.owner is module:
        _running.forward = forward.enclosing
