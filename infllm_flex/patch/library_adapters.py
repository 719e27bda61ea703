"""Adapters for libraries whose attention happens in one replaceable place.

Layers are recognised by their structure, so that copies and forks are served, and no library is
imported. Unlike the general SDPA adapter, these intercept that place alone, know the length before
they do, and know from the layer's settings when patching what cannot be sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from infllm_flex.patch import code_inspection
from infllm_flex.patch.class_swap import Overrides, original_class, own_attribute
from infllm_flex.patch.sdpa_adapter import require_layer, swap_skip_reason
from infllm_flex.patch.sdpa_interception import run_intercepted
from infllm_flex.patch.skip_reasons import NOT_CAUSAL, sliding_window, soft_capped


@dataclass(frozen=True)
class LibraryAdapter:
    """The adapter for one library's attention.

    Attributes:
        name: Name of the adapter, as `describe` shows it.
        recognises: Whether a module, under its name in the model, has such a place.
        find_skip_reason: Why a recognised layer cannot be sparse; None when it can.
        overrides: The members that the swapped class overrides.
    """

    name: str
    recognises: Callable[[str, nn.Module], bool]
    find_skip_reason: Callable[[nn.Module], str | None]
    overrides: Overrides


def find_library_adapter(name: str, module: nn.Module) -> LibraryAdapter | None:
    """The adapter that serves a module, under its name in the model."""
    return next((adapter for adapter in LIBRARY_ADAPTERS if adapter.recognises(name, module)), None)


def _serve(
    module: nn.Module,
    inner: Callable[..., Any],
    length: int,
    *args: Any,
    kv_heads: int | None = None,
    **kwargs: Any,
) -> Any:
    """Call the layer's own code, intercepted where the sequence is long enough."""
    layer = require_layer(module)
    if layer.attends_densely(length):
        return inner(*args, **kwargs)
    owner = original_class(module).__name__
    return run_intercepted(layer, owner, inner, *args, kv_heads=kv_heads, **kwargs)


# torchtune: `self._attention_call(q, k, v, mask=..., ...)`, a function on the instance.


def _is_torchtune(name: str, module: nn.Module) -> bool:
    return callable(vars(module).get("_attention_call"))


def _torchtune_skip_reason(module: nn.Module) -> str | None:
    return NOT_CAUSAL if getattr(module, "is_causal", True) is False else None


def _torchtune_overrides(original: Any) -> dict[str, Any]:
    # A property takes precedence over the instance's attribute, which stays as it is.
    def attention_call(self: nn.Module) -> Callable[..., Any]:
        inner = own_attribute(self, "_attention_call")

        def call(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            return _serve(self, inner, k.shape[2], q, k, v, *args, **kwargs)

        return call

    return {"_attention_call": property(attention_call)}


# litgpt: `self.scaled_dot_product_attention(q, k, v, mask)`, a method.


def _is_litgpt(name: str, module: nn.Module) -> bool:
    return callable(getattr(original_class(module), "scaled_dot_product_attention", None))


def _litgpt_skip_reason(module: nn.Module) -> str | None:
    config = getattr(module, "config", None)
    if (cap := getattr(config, "attention_logit_softcapping", None)) is not None:
        return soft_capped(cap)
    if getattr(module, "apply_sliding_window_attention", False):
        return sliding_window(getattr(config, "sliding_window_size", ""))
    return None


def _litgpt_overrides(original: Any) -> dict[str, Any]:
    inner = original.scaled_dot_product_attention

    def method(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _serve(self, inner, k.shape[2], self, q, k, v, *args, **kwargs)

    return {"scaled_dot_product_attention": method}


# torchtitan: `self.inner_attention(q, k, v, ...)`, a module without parameters.


def _is_torchtitan(name: str, module: nn.Module) -> bool:
    own = name.rpartition(".")[2] == "inner_attention"
    return own and next(module.parameters(), None) is None


def _torchtitan_skip_reason(module: nn.Module) -> str | None:
    if not code_inspection.calls_sdpa(module):
        return f"{original_class(module).__name__}, a masked kernel: build it with SDPA instead"
    return swap_skip_reason(module)


def _torchtitan_overrides(original: Any) -> dict[str, Any]:
    inner = original.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Tensors are [B, H, S, D] or [B, S, H, D], by version. Only the SDPA call inside knows.
        layer = require_layer(self)
        if layer.is_in_dense_context():
            return inner(self, *args, **kwargs)
        return run_intercepted(layer, original.__name__, inner, self, *args, **kwargs)

    return {"forward": forward}


# x-transformers: `self.attend(q, k, v, mask=..., ...)`, a module with flags for its kind.


def _is_x_transformers(name: str, module: nn.Module) -> bool:
    return {"causal", "flash"} <= vars(module).keys() and hasattr(module, "flash_attn")


def _x_transformers_skip_reason(module: Any) -> str | None:
    if not module.causal:
        return NOT_CAUSAL
    if not module.flash:
        return "softmax written by hand: build it with attn_flash=True"
    if getattr(module, "add_zero_kv", False):
        return "a zero key before the first"
    return swap_skip_reason(module)


def _x_transformers_overrides(original: Any) -> dict[str, Any]:
    inner = original.forward

    def forward(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The layer expands the key heads inside, so their number can be read here.
        return _serve(self, inner, k.shape[2], self, q, k, v, *args, kv_heads=k.shape[1], **kwargs)

    return {"forward": forward}


LIBRARY_ADAPTERS = (
    LibraryAdapter(
        "torchtune's _attention_call", _is_torchtune, _torchtune_skip_reason, _torchtune_overrides
    ),
    LibraryAdapter("litgpt's method", _is_litgpt, _litgpt_skip_reason, _litgpt_overrides),
    LibraryAdapter(
        "torchtitan's inner_attention",
        _is_torchtitan,
        _torchtitan_skip_reason,
        _torchtitan_overrides,
    ),
    LibraryAdapter(
        "x-transformers' Attend",
        _is_x_transformers,
        _x_transformers_skip_reason,
        _x_transformers_overrides,
    ),
)
