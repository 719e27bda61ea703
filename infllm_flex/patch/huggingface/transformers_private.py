"""Every private or unstable API of transformers that infllm_flex uses, one function each.

Each docstring says what the API is for, in which versions of transformers it was seen, what happens
when it goes, and the public way out if there is one. ``tests/patch/test_transformers_private.py``
has a test for each; ``scripts/test_private_apis`` runs them with another version of transformers.
Importing this file does not import transformers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infllm_flex.patch.code_inspection import names

REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # name of the registry in the code of attention layers
_MAKES_MASKS = re.compile(r"create_\w*mask")
_OTHER_STATES = re.compile(r"(cross|encoder|key_value)\w*states")
# Names of the cache among the arguments of attention layers, by version and family.
_CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")


# Which modules attend, and by which function.


def reads_attention_registry(forward: Callable[..., Any]) -> bool:
    """Whether a forward looks its attention function up by the name in its config.

    Class names say nothing, and transformers' own check searches the text of the file. Remote code
    written for the indexed form, which ``set_attn_implementation`` refuses, is found as well.

    API: the name ``ALL_ATTENTION_FUNCTIONS`` in the code of an attention layer, seen in 5.4 to
    5.24.
    If it goes: UnsupportedModelError, no attention layer is found.
    Instead: nothing public.
    """
    code = getattr(forward, "__code__", None)
    return code is not None and REGISTRY in code.co_names


def attention_functions(
    forward: Callable[..., Any], implementations: Iterable[str]
) -> dict[str, Callable[..., Any]]:
    """Return an attention layer's functions by the name of their implementation.

    API: ``ALL_ATTENTION_FUNCTIONS.get``, and the global ``eager_attention_forward`` of a modelling
    file, which the registry lacks, seen in 5.4 to 5.24.
    If it goes: an error at the first short sequence of a patched model that was eager.
    Instead: nothing public.

    Args:
        forward: The layer's forward, without decorators.
        implementations: Such as ``"sdpa"``.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = forward.__globals__.get("eager_attention_forward")
    return {name: ALL_ATTENTION_FUNCTIONS.get(name, eager) for name in implementations}


def passes_keyword(forward: Callable[..., Any], keyword: str) -> bool:
    """Whether a forward gives its attention function an argument of this name.

    API: attention functions are called with ``scaling`` and special arguments by keyword, seen in
    5.4 to 5.24.
    If it goes: a layer with a position bias is refused at its first sparse call, not when patched.
    Instead: nothing public.
    """
    constants = forward.__code__.co_consts
    given = [constant for constant in constants if isinstance(constant, tuple)]
    return any(keyword in keywords and "scaling" in keywords for keywords in given)


def makes_masks(forwards: Iterable[Any]) -> bool:
    """Whether one of some forwards asks transformers for masks.

    API: functions named ``create_..._mask`` make masks by the config that they are given, seen in
    5.4 to 5.24.
    If it goes: masks of whole tables where none is needed, and padded batches are refused.
    Instead: nothing public.
    """
    functions = (f for f in forwards if isinstance(f, FunctionType))
    return any(_MAKES_MASKS.search(name) for f in functions for name in names(f.__code__))


def takes_other_states(arguments: Iterable[str]) -> bool:
    """Whether a forward with arguments of these names can take keys from another sequence.

    API: arguments named ``encoder_hidden_states``, ``cross_attention_states`` and
    ``key_value_states``, seen in 5.4 to 5.24.
    If it goes: cross-attention without ``is_causal`` is patched as self-attention.
    Instead: nothing public.
    """
    return any(_OTHER_STATES.fullmatch(name) for name in arguments)


def is_model(module: Any) -> bool:
    """Whether a module is a model of transformers, or a part that transformers treats as one.

    API: ``PreTrainedModel``, seen in 5.4 to 5.24.
    If it goes: vision and audio towers are patched where their layers say that they are causal.
    Instead: it is public; only the look-up without an import is not.
    """
    utils = sys.modules.get("transformers.modeling_utils")
    return utils is not None and isinstance(module, utils.PreTrainedModel)


# The name of the attention function in a config.


def implementation_attribute() -> str:
    """Return the attribute of a config that holds the name of its attention implementation.

    API: ``PreTrainedConfig._attn_implementation_internal``, seen in 5.4 to 5.24.
    If it goes: a patched model attends densely; `describe` shows its layers as not patched.
    Instead: nothing public; ``set_attn_implementation`` changes configs that models share.
    """
    return "_attn_implementation_internal"


def has_implementation(config: Any) -> bool:
    """Whether an object is a config that names an attention implementation.

    API: ``PreTrainedConfig._attn_implementation``, seen in 5.4 to 5.24.
    If it goes: a model that its config made sparse stays sparse when it is unpatched.
    Instead: nothing public.
    """
    return hasattr(config, "_attn_implementation")


def override_implementation(
    view_class: Any, own: str, rename: Callable[[str | None, str | None], str | None]
) -> None:
    """Let a subclass of a config's class decide the name of its attention implementation.

    API: the property ``PreTrainedConfig._attn_implementation``, seen in 5.4 to 5.24.
    If it goes: a patched model attends densely; `describe` shows its layers as not patched.
    Instead: nothing public.

    Args:
        view_class: The class, whose ``_infllm_class`` is that of the config.
        own: Attribute of ``view_class`` with a name of its own, or None.
        rename: From that name and the name that is stored in the config to the name it has.
    """
    stored = implementation_attribute()

    def get(self: Any) -> str | None:
        # Every layer asks at every call, and a config's own look-up takes longer than all of this.
        look_up = getattr if torch.compiler.is_compiling() else object.__getattribute__
        return rename(look_up(self, own), look_up(self, stored))

    def put(self: Any, value: Any) -> None:
        self._infllm_class._attn_implementation.fset(self, value)

    view_class._attn_implementation = property(get, put)


def get_implementation(config: Any) -> Any:
    """Return the name of a config's attention implementation; None if it has none.

    API: ``PreTrainedConfig._attn_implementation``, seen in 5.4 to 5.24.
    If it goes: UnsupportedModelError when patching.
    Instead: nothing public.
    """
    return getattr(config, "_attn_implementation", None)


def set_own_implementation(config: Any, name: str | None) -> None:
    """Set a config's attention implementation (None: by default); leave its sub-configs theirs.

    API: ``PreTrainedConfig._attn_implementation_internal``, seen in 5.4 to 5.24.
    If it goes: a model that its config made sparse stays sparse when it is unpatched.
    Instead: ``set_attn_implementation``, which overwrites the sub-configs.
    """
    setattr(config, implementation_attribute(), name)


def sub_configs(config: Any) -> dict[str, Any]:
    """Return the sub-configs that a config holds, by attribute.

    API: ``PreTrainedConfig.sub_configs``, seen in 5.4 to 5.24.
    If it goes: models of several parts attend densely.
    Instead: nothing public.
    """
    held = {key: vars(config).get(key) for key in getattr(config, "sub_configs", None) or ()}
    return {key: part for key, part in held.items() if part is not None}


# Masks.


def make_sdpa_mask(arguments: Mapping[str, Any], skip_causal: bool = True) -> Tensor | None:
    """Make the mask of ``sdpa`` from the arguments that transformers gives to mask functions.

    API: ``masking_utils.sdpa_mask`` and its argument ``allow_is_causal_skip``, seen in 5.4 to 5.24.
    If it goes: TypeError, or another mask, below ``dense_len``.
    Instead: nothing public.

    Args:
        arguments: As a registered mask function received them.
        skip_causal: Whether the result may be None for a causal mask; padding is then read.
    """
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**(arguments if skip_causal else {**arguments, "allow_is_causal_skip": False}))


def is_plain_mask(arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments of a mask function ask for causal and padded, nothing else.

    API: ``masking_utils.causal_mask_function`` as the argument ``mask_function``, seen in 5.4 to
    5.24.
    If it goes: every mask is judged by its values.
    Instead: nothing public.
    """
    from transformers.masking_utils import causal_mask_function

    return arguments["mask_function"] is causal_mask_function


def is_mask_of_new_keys(arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments of a mask function are for causal attention without earlier keys.

    API: the arguments ``q_length``, ``kv_length``, ``q_offset``, ``kv_offset``, ``local_size``,
    ``use_vmap``, ``batch_size``, ``attention_mask``, and ``allow_is_bidirectional_skip``, which
    only masks that are not causal have, seen in 5.4 to 5.24.
    If it goes: tables ``[B, 1, S, S]`` for padded and packed batches, or KeyError.
    Instead: nothing public.
    """
    length, padding = arguments.get("q_length"), arguments.get("attention_mask")
    offsets = (arguments.get(name, 0) for name in ("q_offset", "kv_offset"))
    return (
        length is not None
        and arguments.get("kv_length") == length
        and all(not isinstance(offset, Tensor) and offset == 0 for offset in offsets)
        and arguments.get("local_size") is None
        and not arguments.get("use_vmap", False)
        and "allow_is_bidirectional_skip" not in arguments
        and (padding is None or padding.shape == (arguments["batch_size"], length))
    )


def without_long_window(arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop a window that is longer than all keys from the arguments of a mask function.

    API: the argument ``local_size``, and ``allow_is_causal_skip``, which is True if the mask is
    causal with at most a window and padding, seen in 5.4 to 5.24.
    If it goes: a layer whose window covers all keys is refused at sparse length.
    Instead: nothing public.
    """
    from transformers.masking_utils import causal_mask_function

    window, kv_length = arguments.get("local_size"), arguments.get("kv_length")
    if not isinstance(window, int) or not isinstance(kv_length, int) or window <= kv_length:
        return arguments
    arguments = {**arguments, "local_size": None}
    if arguments.get("allow_is_causal_skip") is True:
        arguments["mask_function"] = causal_mask_function
    return arguments


def plain_mask_arguments(batch_size: int, length: int, padding: Tensor) -> dict[str, Any]:
    """Return the arguments of a mask function for a causal and padded mask.

    API: the arguments of ``masking_utils.sdpa_mask``, seen in 5.4 to 5.24.
    If it goes: TypeError after a prompt over a static cache.
    Instead: nothing public.

    Args:
        batch_size: Number of rows.
        length: Number of queries and of keys.
        padding: bool ``[batch_size, length]``, true for real tokens.
    """
    from transformers.masking_utils import causal_mask_function

    return {
        "batch_size": batch_size,
        "q_length": length,
        "kv_length": length,
        "mask_function": causal_mask_function,
        "attention_mask": padding,
        "device": padding.device,
    }


def sees(arguments: Mapping[str, Any], row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Evaluate a mask function: whether queries see keys, apart from padding.

    API: ``mask_function(row, head, query, key)`` on tensors of indices, seen in 5.4 to 5.24.
    If it goes: TypeError, or packed batches are refused, at sparse length.
    Instead: nothing public.
    """
    return arguments["mask_function"](row, 0, query, key)


# Caches.


def find_cache(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the keywords of an attention layer; None without one.

    API: the keywords ``cache``, ``past_key_values``, ``layer_past`` and ``past_key_value``, seen in
    5.4 to 5.24.
    If it goes: NotImplementedError at sparse steps: no layer of a cache holds the keys.
    Instead: nothing public.
    """
    for name in _CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is not None:
            return cache
    return None


def takes_cache(arguments: Iterable[str]) -> bool:
    """Whether a forward with arguments of these names takes a cache.

    API: the names that `find_cache` looks for, seen in 5.4 to 5.24.
    If it goes: some microseconds more per layer and step.
    Instead: nothing public.
    """
    return not set(_CACHE_NAMES).isdisjoint(arguments)


def cache_layers(cache: Any) -> list[Any] | None:
    """Return the layers of a cache; None for what is no cache of layers.

    API: ``Cache.layers``, and ``EncoderDecoderCache.self_attention_cache``, seen in 5.4 to 5.24.
    If it goes: NotImplementedError at sparse steps.
    Instead: nothing public.
    """
    return getattr(getattr(cache, "self_attention_cache", cache), "layers", None)


def is_offloading(cache: Any) -> bool:
    """Whether a cache keeps its layers on the CPU between their calls.

    API: ``Cache.offloading``, seen in 5.4 to 5.24.
    If it goes: slower steps: compressed keys are computed anew in each.
    Instead: nothing public.
    """
    return bool(getattr(getattr(cache, "self_attention_cache", cache), "offloading", False))


def is_static(layer: Any) -> bool:
    """Whether a cache layer is preallocated, and only the device knows its length.

    API: ``StaticLayer.cumulative_length`` is a tensor, seen in 5.4 to 5.24.
    If it goes: RuntimeError at sparse steps over a static cache.
    Instead: nothing public.
    """
    return isinstance(getattr(layer, "cumulative_length", None), Tensor)


def growing_layer_class() -> type:
    """Return the class of cache layers that only append, whose place a tracked layer takes.

    API: ``cache_utils.DynamicLayer`` keeps its tensors ``[B, H, S, D]`` in ``keys`` and ``values``,
    and changes them in ``update``, ``crop``, ``reorder_cache``, ``batch_repeat_interleave``,
    ``batch_select_indices``, ``offload``, ``prefetch`` and ``reset`` alone, seen in 5.4 to 5.24.
    If it goes: slower steps, where another method replaces the keys; an error elsewhere.
    Instead: nothing public.
    """
    from transformers.cache_utils import DynamicLayer

    return DynamicLayer


def hybrid_layer_class() -> type | None:
    """Return the class of cache layers with a recurrent state beside keys; None without one.

    API: ``cache_utils.LinearAttentionAndFullAttentionLayer``, seen in 5.4 to 5.24.
    If it goes: slower steps of hybrid models.
    Instead: nothing public.
    """
    from transformers import cache_utils

    return getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)


class PagedStep(NamedTuple):
    """The requests of a step of continuous batching.

    Attributes:
        query_bounds: int32 ``[N + 1]``, where the queries of each request start and the last end.
        key_bounds: The same for the keys.
        longest: Keys of the longest request, or more.
    """

    query_bounds: Tensor
    key_bounds: Tensor
    longest: int


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching, which holds the keys of many requests.

    API: the class ``generation.continuous_batching.PagedAttentionCache``, which attention layers
    get under one of the names of `find_cache`, seen in 5.4 to 5.24.
    If it goes: NotImplementedError at sparse steps of continuous batching.
    Instead: nothing public.
    """
    return type(cache).__name__ == "PagedAttentionCache"


def update_pages(
    module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Write new keys and values to their pages, and read those of all requests.

    API: ``PagedAttentionCache.update``. The function ``sdpa`` calls it with a keyword ``cache``,
    seen in 5.20 to 5.23; attention layers call it before any attention function, seen in 5.24.
    If it goes: TypeError in the first step of continuous batching.
    Instead: nothing public.

    Args:
        module: The attention layer.
        key: ``[1, Hkv, n, D]``, of the new tokens, or what the layer has read already.
        value: ``[1, Hkv, n, D]``, likewise.
        kwargs: The other keywords of the attention function, which are changed.

    Returns:
        Keys and values ``[1, Hkv, S, D]``.
    """
    cache: Any = kwargs.pop("cache", None)
    if not is_paged(cache):
        return key, value
    keys, values = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
    )
    return keys, values


def paged_step(kwargs: Mapping[str, Any]) -> PagedStep:
    """Read the requests of a step from the keywords of an attention function, after the update.

    API: continuous batching leaves the name ``sdpa``, gives attention functions the keys of all
    requests one behind the other, and says by ``cu_seq_lens_q``, ``cu_seq_lens_k`` and
    ``max_length_k`` where they are, seen in 5.20 to 5.24. Before, it set names with ``paged|``,
    which a patched model refuses.
    If it goes: KeyError in the first step of continuous batching.
    Instead: nothing public.
    """
    return PagedStep(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], kwargs["max_length_k"])
