"""Masks that are spelled out, ``[B, 1, S, S]``, only where dense attention asks for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from infllm_flex.patch.forward_context import begin_unhooked_forward, current_forward
from infllm_flex.patch.huggingface.tensor_proxy import TensorProxy
from infllm_flex.validation import has_values, is_recorded


class LazyMask(TensorProxy):
    """What ``sdpa_mask`` would make of its arguments, for a call without earlier keys.

    A long padded or packed batch attends sparsely and needs no table of all pairs; whether it will,
    only the attention layers know.

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
        self._is_exposed = False
        self.dtype = torch.bool

    @property
    def device(self) -> torch.device:
        """Where it would be."""
        return self._device

    @property
    def ndim(self) -> int:
        """Of the mask spelled out."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the mask spelled out."""
        length = self._arguments["q_length"]
        return (self._arguments["batch_size"], 1, length, length)

    def to(self, *args: Any, **kwargs: Any) -> LazyMask:
        """Move to a device, as what spreads a model over several does with every argument.

        Another dtype is that of the tensor for who asks for one; in attention it stays a mask.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        moved = copy.copy(self)
        moved.dtype = self.dtype if dtype is None else dtype
        if device is not None:
            moved._device, moved._tensor = device, None
            moved.padding = None if self.padding is None else self.padding.to(device)
        return moved

    def to_tensor(self) -> Tensor:
        """The mask spelled out, for code that is not ours and may change it."""
        tensor = self.materialize()
        if tensor is None:
            raise TypeError("a plain causal mask is None to transformers: there is no tensor")
        self._is_exposed = True
        return tensor.to(self.dtype)

    def is_edited(self) -> bool:
        """Whether the mask was changed in place since it was spelled out. Reads it if it may be."""
        if not self._is_exposed or torch.compiler.is_compiling():
            return False
        again = copy.copy(self)
        again._tensor = None
        return not torch.equal(cast(Tensor, self.materialize()), cast(Tensor, again.materialize()))

    def materialize(self) -> Tensor | None:
        """What ``sdpa_mask`` returns: None for plain causal, else bool ``[B, 1, S, S]``."""
        from transformers.masking_utils import sdpa_mask

        if self._tensor is None:
            arguments = self._arguments
            if self.padding is not None and not has_values(self.padding):
                arguments = {**arguments, "allow_is_causal_skip": False}  # it would be read
            tensor = sdpa_mask(**arguments)
            self._tensor = None if tensor is None else tensor.to(self._device)
        return self._tensor

    def is_known(self, verdict: Callable[[], Tensor]) -> bool:
        """What the layers of a forward ask about this mask, read once for all of them."""
        if self._verdict is None:
            self._verdict = bool(verdict())
        return self._verdict

    def isolates_documents(self, opens: Tensor, is_real: Tensor) -> Tensor:
        """Whether the mask is causal within the sequences, from lines through it: bool ``[]``.

        What each query sees just before and after itself, of its sequence's first token and of the
        token before that, and what each sequence's last query sees of its tokens. So packing is
        told from prefixes, windows and blocks without a table of all pairs.

        Args:
            opens: bool ``[B, S]``, whether a sequence starts at this token.
            is_real: bool ``[B, S]``, false at padding.
        """
        home = self._arguments.get("device", "cpu")  # where the mask function's own tensors are
        opens, is_real = opens.to(home), is_real.to(home)
        B, S = opens.shape
        token = torch.arange(S, device=opens.device).expand(B, -1)
        first = torch.where(opens, token, 0).cummax(-1).values
        # Backwards, the same for the last: where the next sequence opens, less one.
        closes = opens.roll(-1, -1)
        closes = torch.where(token == S - 1, True, closes)
        last = torch.where(closes, token, S - 1).flip(-1).cummin(-1).values.flip(-1)
        row = torch.arange(B, device=opens.device)[:, None]

        def sees(query: Tensor, key: Tensor) -> Tensor:
            inside = (key >= 0) & (key < S)
            key = key.clamp(0, S - 1)
            visible = self._arguments["mask_function"](row, 0, query, key)
            return visible & inside & is_real.gather(-1, key)  # which the function leaves out

        right = (
            (sees(token, token - 1) == ~opens)
            & ~sees(token, token + 1)
            & sees(token, first)
            & ~sees(token, first - 1)
            & sees(last, token)
        )
        return (right | ~is_real).all().to(self._device)


def materialize(mask: LazyMask | Tensor | None) -> Tensor | None:
    """The tensor that a mask is, or stands for."""
    return mask.materialize() if isinstance(mask, LazyMask) else mask


def causal_mask(**arguments: Any) -> LazyMask | Tensor | None:
    """Make the mask of ``sdpa``, lazily where all keys are those of this call.

    Args:
        arguments: As transformers passes them to mask functions.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    arguments = _without_long_window(arguments)
    begin_unhooked_forward()
    length, padding = arguments.get("q_length"), arguments.get("attention_mask")
    lazily = (
        length is not None
        and arguments.get("kv_length") == length
        and all(_is_zero(arguments.get(offset, 0)) for offset in ("q_offset", "kv_offset"))
        and arguments.get("local_size") is None
        and not arguments.get("use_vmap", False)
        and "allow_is_bidirectional_skip" not in arguments  # the mask is not for causal attention
        and (padding is None or padding.shape == (arguments["batch_size"], length))
    )
    if not lazily:
        return sdpa_mask(**arguments)
    is_plain = arguments["mask_function"] is causal_mask_function
    if is_plain and padding is None:
        mask = sdpa_mask(**arguments)  # as a rule None
        if mask is None or not torch.compiler.is_compiling():
            return mask
    elif is_plain and _is_all(padding):
        return sdpa_mask(**arguments)
    lazy = LazyMask({"attention_mask": None, **arguments}, is_plain)
    if not torch.compiler.is_compiling() and (forward := current_forward()) is not None:
        forward.mark(lazy)
    return lazy


def _is_all(mask: Tensor | None) -> bool:
    """Whether a mask is known to hold ones alone."""
    return mask is not None and not is_recorded(mask) and has_values(mask) and bool(mask.all())


def _is_zero(offset: int | Tensor) -> bool:
    return not isinstance(offset, Tensor) and offset == 0


def _without_long_window(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a mask function, less a window that is longer than all keys."""
    from transformers.masking_utils import causal_mask_function

    window, kv_length = arguments.get("local_size"), arguments.get("kv_length")
    if not isinstance(window, int) or not isinstance(kv_length, int) or window <= kv_length:
        return arguments
    arguments = {**arguments, "local_size": None}
    if arguments.get("allow_is_causal_skip") is True:
        # transformers allows it if there is nothing beyond causal, the window and padding.
        arguments["mask_function"] = causal_mask_function
    return arguments
