"""Hooks on the models inside a model that record each forward as a `ForwardContext`."""

from __future__ import annotations

import inspect
import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from infllm_flex.patch.forward_context import ForwardContext
from infllm_flex.patch.huggingface.cache_hook import (
    install_cache_hook,
    remove_cache_hook,
    require_our_name,
)
from infllm_flex.patch.huggingface.transformers_private import (
    find_cache,
    is_paged,
    takes_cache,
)
from infllm_flex.patch.layer_state import own_layer
from infllm_flex.patch.running_forward import (
    current_forward,
    drop_ended_forwards,
    enclosing_forward,
    set_current_forward,
)
from infllm_flex.validation import has_values, is_recorded
from infllm_flex_ops import torch_private

_numbers = itertools.count()
_GIVEN = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")


def install_forward_hooks(model: nn.Module) -> None:
    """Record every forward of ``model``, and of the transformers models inside it.

    Layers whose model is given their cache need no hook of their own, which would take longer than
    the rest of what a patched layer adds to a short step.
    """
    remove_forward_hooks(model)
    openings: dict[nn.Module, _Opening] = {}
    around: dict[nn.Module, _Opening] = {}  # the innermost one
    for module in model.modules():
        names = _arguments(module)
        if "position_ids" in names:
            layers = [layer for part in module.modules() if (layer := own_layer(part)) is not None]
            sparse_from = min(
                (x.config.dense_len for x in layers if x.skip_reason is None), default=0
            )
            opening = _Opening(names, _is_of_transformers(module), sparse_from)
            openings[module] = opening
            around.update(dict.fromkeys(module.modules(), opening))
    for module, opening in around.items():
        if takes_cache(opening.names) and remove_cache_hook(module):
            opening.layers.append(module)
    for module, opening in openings.items():
        inner = {openings[part].number for part in module.modules() if part in openings}
        opening.inner_hooks = frozenset(inner - {opening.number})
        module.register_forward_pre_hook(opening, with_kwargs=True)
        module.register_forward_hook(_close, always_call=True)


def remove_forward_hooks(model: nn.Module) -> None:
    """Undo `install_forward_hooks`."""
    for module in model.modules():
        torch_private.remove_forward_pre_hooks(module, lambda hook: isinstance(hook, _Opening))
        torch_private.remove_forward_hooks(module, lambda hook: hook is _close)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Arguments of a transformers model's forward, in order; nothing for other modules.

    Layers have no forward context of their own: they may be recomputed where no model runs.
    """
    # By name, because transformers may not be installed.
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__):
        return ()
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _is_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


class _Opening:
    """The hook before a model's forward.

    Attributes:
        names: Arguments of the forward, in order.
        is_known: Whether the model is one of transformers.
        sparse_from: Least number of tokens at which one of its layers is sparse.
        layers: Attention layers that take the cache from the forward, not from a hook.
        number: The hook's own number, and that of its copies.
        inner_hooks: Numbers of the hooks of the models inside.
    """

    def __init__(self, names: tuple[str, ...], is_known: bool, sparse_from: int) -> None:
        self.names = names
        self.is_known = is_known
        self.sparse_from = sparse_from
        self.layers: list[nn.Module] = []
        self.number = next(_numbers)
        self.inner_hooks: frozenset[int] = frozenset()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        compiling = torch.compiler.is_compiling()
        must_own = torch.is_grad_enabled() and not compiling
        if must_own:
            # Tensors of this forward's own, by which layers that are recomputed later find it.
            named = zip(self.names, args, strict=False)
            args = (*(_own(name, x) for name, x in named), *args[len(self.names) :])
            kwargs = {name: _own(name, x) for name, x in kwargs.items()}
        given = {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs
        positions = given.get("position_ids")
        # The models of transformers make positions that count up, unless another hook adds some.
        counts_up = self.is_known and positions is None
        counts_up = counts_up and len(torch_private.forward_pre_hooks(module)) == 1
        caller = None if compiling else sys._getframe(1)
        running = current_forward()
        if running is not None and caller is not None:
            drop_ended_forwards(caller.f_back)
            running = current_forward()
        forward = ForwardContext(
            module,
            None if running is None else enclosing_forward(self.number),
            _of_text(positions),
            given.get("cu_seq_lens_q"),
            counts_up,
            find_cache(given),
            self.sparse_from,
        )
        forward.previous = running
        forward.inner_hooks = self.inner_hooks
        if caller is not None:
            forward.code = torch_private.code_that_calls(module, caller)
        set_current_forward(forward)
        if not compiling:
            paged = is_paged(forward.cache)
            for layer in self.layers:
                if paged:
                    require_our_name(layer)
                if "forward" in layer.__dict__:
                    install_cache_hook(layer)  # which also watches that forward
        if not must_own:
            return None
        if forward.bounds is None and _has_documents(forward.positions):
            forward.begin_count()
        return args, kwargs


def _has_documents(positions: Tensor | None) -> bool:
    """Whether positions may mark documents, and can be read."""
    if positions is None or positions.shape[-1] < 2 or is_recorded(positions):
        return False
    return has_values(positions)


def _of_text(positions: Any) -> Tensor | None:
    """Positions as ``[1 or B, S]``: the first of several axes."""
    if not isinstance(positions, Tensor) or not 0 < positions.dim() < 4:
        return None
    if positions.dim() == 1:
        return positions[None]
    # With images, the first axis is the text's, or time, which goes back only where the text does.
    return positions[0] if positions.dim() == 3 else positions


def _own(name: str, value: Any) -> Any:
    return value.view_as(value) if name in _GIVEN and isinstance(value, Tensor) else value


def _close(module: nn.Module, args: Any, output: Any) -> None:
    forward = current_forward()
    while forward is not None and forward.owner_ref() is not module:
        forward = forward.previous  # ended, or never begun
    if forward is not None:
        set_current_forward(forward.previous)
