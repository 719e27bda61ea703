"""Masks that become a table ``[B, 1, S, S]`` only where dense attention needs one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from infllm_flex.patch.causal_masks import isolates_documents
from infllm_flex.patch.host_read import HostRead
from infllm_flex.patch.huggingface.tensor_proxy import TensorProxy
from infllm_flex.patch.huggingface.transformers_private import (
    is_mask_of_new_keys,
    is_plain_mask,
    make_sdpa_mask,
    sees,
    without_long_window,
)
from infllm_flex.patch.running_forward import begin_unhooked_forward, current_forward
from infllm_flex.validation import has_values, is_recorded
from infllm_flex_ops import torch_private


class LazyMask(TensorProxy):
    """The mask that ``sdpa_mask`` would make of its arguments, for a call without earlier keys.

    A long padded or packed batch attends sparsely and needs no table of all pairs. Only the layers
    know whether it will. The mask looks like a tensor because hooks and `accelerate` may use it,
    and so do models that edit masks.

    Attributes:
        padding: bool ``[B, S]``, true for real tokens; None without an ``attention_mask``.
        is_plain: Whether it is causal and padded, nothing else.
    """

    def __init__(self, arguments: dict[str, Any], is_plain: bool) -> None:
        self._arguments = arguments
        self.is_plain = is_plain
        self.padding: Tensor | None = arguments["attention_mask"]
        self._device = torch.device(arguments.get("device", "cpu"))
        self._tensor: Tensor | None = None
        self._verdict: bool | None = None
        self._early_verdict: tuple[Tensor, HostRead] | None = None
        self._is_exposed = False
        self.dtype = torch.bool

    @property
    def device(self) -> torch.device:
        """Device of the table."""
        return self._device

    @property
    def ndim(self) -> int:
        """Number of dimensions of the table."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the table."""
        length = self._arguments["q_length"]
        return (self._arguments["batch_size"], 1, length, length)

    def to(self, *args: Any, **kwargs: Any) -> LazyMask:
        """Move to a device, as `accelerate` does with every argument of a spread model.

        A dtype applies to the tensor that others get. Attention still takes the mask as a mask.
        """
        device, dtype = torch_private.parse_to(*args, **kwargs)
        moved = copy.copy(self)
        moved.dtype = self.dtype if dtype is None else dtype
        if device is not None:
            moved._device, moved._tensor = device, None
            moved.padding = None if self.padding is None else self.padding.to(device)
        return moved

    def to_tensor(self) -> Tensor:
        """The table, for code that is not ours and may change it."""
        tensor = self.materialize()
        if tensor is None:
            raise TypeError("a plain causal mask is None to transformers: there is no tensor")
        self._tensor, self._is_exposed = tensor, True
        return tensor.to(self.dtype)

    def is_edited(self) -> bool:
        """Whether the table was changed in place. Compares it if other code has had it."""
        if not self._is_exposed or torch.compiler.is_compiling():
            return False
        again = copy.copy(self)
        again._tensor = None
        return not torch.equal(cast(Tensor, self.materialize()), cast(Tensor, again.materialize()))

    def materialize(self) -> Tensor | None:
        """The mask of ``sdpa_mask``: None for plain causal, else bool ``[B, 1, S, S]``."""
        if self._tensor is not None:
            return self._tensor
        # transformers reads the padding to see whether it may skip the mask.
        can_read = self.padding is None or has_values(self.padding)
        tensor = make_sdpa_mask(self._arguments, skip_causal=can_read)
        tensor = None if tensor is None else tensor.to(self._device)
        # In a graph the layers may be checkpointed, and such a layer may not change what lies
        # outside of it. The compiler merges the equal tables of the layers.
        if not torch.compiler.is_compiling():
            self._tensor = tensor
        return tensor

    def begin_verdict(self, positions: Tensor, verdict: Tensor) -> None:
        """Begin to read a verdict, bool ``[]``, that follows from ``positions``."""
        self._early_verdict = positions, HostRead(verdict)

    def judge_once(self, positions: Tensor | None, verdict: Callable[[], Tensor]) -> bool:
        """Read a verdict about this mask once for all layers of a forward.

        Args:
            positions: Positions that the verdict depends on, too; None without any.
            verdict: Computes it, where it was not begun early.
        """
        early = self._early_verdict
        if self._verdict is None and early is not None and early[0] is positions:
            self._verdict = bool(early[1].wait())
        if self._verdict is None:
            self._verdict = bool(verdict())
        return self._verdict

    def isolates_documents(self, opens: Tensor, is_real: Tensor) -> Tensor:
        """Whether the mask is causal within the documents: bool ``[]``.

        Args:
            opens: bool ``[B, S]``, whether a document starts at this token.
            is_real: bool ``[B, S]``, false at padding.
        """

        def visible(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(self._arguments, row, query, key)

        home = self._arguments.get("device", "cpu")  # where the mask function's own tensors are
        return isolates_documents(visible, opens.to(home), is_real.to(home)).to(self._device)


def materialize(mask: LazyMask | Tensor | None) -> Tensor | None:
    """The tensor that a mask is, or stands for."""
    return mask.materialize() if isinstance(mask, LazyMask) else mask


def causal_mask(**arguments: Any) -> LazyMask | Tensor | None:
    """Make the mask of ``sdpa``, lazily where all keys are those of this call.

    Args:
        arguments: As transformers passes them to mask functions.
    """
    arguments = without_long_window(arguments)
    begin_unhooked_forward()
    if not is_mask_of_new_keys(arguments):
        return make_sdpa_mask(arguments)
    padding, is_plain = arguments.get("attention_mask"), is_plain_mask(arguments)
    if is_plain and padding is None:
        mask = make_sdpa_mask(arguments)  # None, unless transformers needs a table here
        if mask is None or not torch.compiler.is_compiling():
            return mask
    elif is_plain and _is_all_ones(padding):
        return make_sdpa_mask({**arguments, "attention_mask": None})  # reading it once is enough
    lazy = LazyMask({"attention_mask": None, **arguments}, is_plain)
    if not torch.compiler.is_compiling() and (forward := current_forward()) is not None:
        forward.mark(lazy)
    return lazy


def _is_all_ones(mask: Tensor | None) -> bool:
    """Whether a mask is known to hold nothing but ones."""
    return mask is not None and not is_recorded(mask) and has_values(mask) and bool(mask.all())
