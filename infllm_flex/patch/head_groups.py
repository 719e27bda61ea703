"""Recover the query groups of models that expand keys and values to the query heads.

A group selects its blocks together. Its size comes from the model's config or the caller, and is
checked on the keys themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.head_dims import read_head_dim
from infllm_flex.patch.layer_configs import config_of_full_layer, config_of_layer
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex.validation import assert_in_graph

_KV_NAMES = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_kv_head",
    "n_local_kv_heads",
    "kv_heads",
    "n_query_groups",
    "num_query_groups",
    "n_local_heads",  # gpt-fast
)
_QUERY_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nheads", "heads")
_CONFIG_NAMES = ("config", "cfg", "args", "params")

_RUNS = "runs"  # aabb: repeat_interleave, expand
_CYCLES = "cycles"  # abab: repeat
_DISTINCT = "distinct"  # abcd: not expanded


class Heads(NamedTuple):
    """The heads of attention layers; None where it is not known.

    Attributes:
        head_dim: Head size of queries and keys.
        per_group: Query heads to a key/value head.
    """

    head_dim: int | None = None
    per_group: int | None = None


class Regrouped(NamedTuple):
    """Queries, and keys and values with one head per group.

    Attributes:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        cycles: Heads per cycle, where the query heads were reordered; None elsewhere.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cycles: int | None

    def restore(self, out: Tensor) -> Tensor:
        """Put the heads of an output ``[B, Hq, Sq, D]`` back into the model's order."""
        return out if self.cycles is None else _transpose_heads(out, self.cycles)


def check_kv_heads(kv_heads: object) -> None:
    """Raise a ValueError unless ``kv_heads`` is None or a positive integer."""
    if kv_heads is None:
        return
    if not isinstance(kv_heads, int) or isinstance(kv_heads, bool) or kv_heads < 1:
        raise ValueError(f"num_key_value_heads must be a positive integer, got {kv_heads!r}")


def count_heads(
    module: nn.Module, model: nn.Module, kv_heads: int | None
) -> tuple[int | None, int | None]:
    """Read the query and key/value heads of a layer from its attributes, else from its config.

    Args:
        module: The attention layer.
        model: The model around it.
        kv_heads: The user's number, which takes precedence.

    Returns:
        Query heads and key/value heads; None for a number that is not found.
    """
    index = vars(module).get("layer_idx")
    configs = (config_of_layer(c, index) for c in (*_configs(module), *_configs(model)))
    places = [module, *(config for config in configs if config is not None)]
    query_heads = _first_number(places, _QUERY_NAMES)
    found = kv_heads or _first_number(places, _KV_NAMES)
    if found is not None and query_heads is not None and query_heads % found:
        found = None
    return query_heads, found


def read_heads(module: nn.Module, model: nn.Module, kv_heads: int | None = None) -> Heads:
    """The heads of a layer, as `count_heads` reads them."""
    query_heads, found = count_heads(module, model, kv_heads)
    return _heads(module, query_heads, found)


def read_heads_of_config(model_config: object) -> Heads:
    """The heads of a model's first layer with full attention, by its config alone."""
    model_config = config_of_full_layer(model_config)
    query_heads = _first_number([model_config], _QUERY_NAMES)
    heads = _heads(model_config, query_heads, _first_number([model_config], _KV_NAMES))
    width = _first_number([model_config], ("hidden_size",))
    if heads.head_dim is None and query_heads and width:  # many configs leave it to their layers
        return heads._replace(head_dim=width // query_heads)
    return heads


def _heads(place: object, query_heads: int | None, kv_heads: int | None) -> Heads:
    per_group = query_heads // kv_heads if query_heads and kv_heads else None
    return Heads(read_head_dim(place), per_group)


def _configs(module: nn.Module) -> list[Any]:
    return [vars(module)[name] for name in _CONFIG_NAMES if name in vars(module)]


def _first_number(places: Iterable[Any], names: tuple[str, ...]) -> int | None:
    for place in places:
        for name in names:
            found = place.get(name) if isinstance(place, dict) else getattr(place, name, None)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return None


def regroup(
    layer: PatchedLayer, query: Tensor, key: Tensor, value: Tensor, kv_heads: int | None
) -> Regrouped:
    """Keep one key head per group where the model has expanded the key heads.

    Args:
        layer: The record of the layer; remembers how the model orders its heads.
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``, or ``[B, Hq, Skv, D]`` where expanded.
        value: The same.
        kv_heads: Key/value heads, where the caller knows better than the record.

    Raises:
        UnsupportedModelError: The keys are not expanded from ``kv_heads`` heads.
    """
    groups = _group_size(layer, query.shape[1], kv_heads)
    if groups == 1 or key.shape[1] != query.shape[1]:
        if groups == 1 and key.shape[1] == query.shape[1] > 1:
            _require_distinct(layer, key)
        return Regrouped(query, key, value, None)
    count = query.shape[1] // groups
    order, key = _find_head_order(layer, key, count)
    if order == _RUNS:
        return Regrouped(query, key[:, ::groups], value[:, ::groups], None)
    return Regrouped(_transpose_heads(query, groups), key[:, :count], value[:, :count], count)


def _group_size(layer: PatchedLayer, query_heads: int, kv_heads: int | None) -> int:
    if kv_heads is None and layer.kv_heads is not None and layer.query_heads is not None:
        # Both are of the whole layer, so their ratio also holds for a tensor-parallel part.
        return layer.query_heads // layer.kv_heads
    kv_heads = kv_heads or layer.kv_heads
    return 1 if kv_heads is None or query_heads % kv_heads else query_heads // kv_heads


def _transpose_heads(x: Tensor, outer: int) -> Tensor:
    """Reorder heads ``[B, outer * inner, S, D]`` to ``[B, inner * outer, S, D]``."""
    return x.unflatten(1, (outer, -1)).transpose(1, 2).flatten(1, 2)


def _find_head_order(layer: PatchedLayer, key: Tensor, count: int) -> tuple[str, Tensor]:
    """How ``count`` heads were expanded, read from the last key, once per layer.

    A graph cannot read it. It takes the order seen before, or else the common one, and asserts it.

    Returns:
        The order, and ``key``; in a graph its values depend on the check.
    """
    last = key[:, :, -1].detach()
    runs = last.unflatten(1, (count, -1))
    cycles = last.unflatten(1, (-1, count))
    in_runs, in_cycles = (runs == runs[:, :, :1]).all(), (cycles == cycles[:, :1]).all()
    message = (
        f"the keys of {key.shape[1]} heads are not {count} expanded ones; pass the right "
        "num_key_value_heads= to patch_model (and run once without torch.compile, where heads are "
        "expanded by repeat)"
    )
    if torch.compiler.is_compiling():
        order = layer.head_order or _RUNS
        fits = in_runs if order == _RUNS else in_cycles
        return order, assert_in_graph(key, fits, message)
    if layer.head_order is None:
        fits_runs, fits_cycles = bool(in_runs), bool(in_cycles)
        if not (fits_runs or fits_cycles):
            raise UnsupportedModelError(message)
        if fits_runs and fits_cycles and count > 1:  # equal keys do not tell the order
            return _RUNS, key
        layer.head_order = _RUNS if fits_runs else _CYCLES
    return layer.head_order, key


def _require_distinct(layer: PatchedLayer, key: Tensor) -> None:
    """Refuse expanded keys of a model that does not say so: each head would select for itself."""
    if torch.compiler.is_compiling() or layer.head_order is not None:
        return
    last = key[:, :, -1].detach()
    copies = (last[:, 1:] == last[:, :1]).all(-1).any() & last.any()  # keys may be all zero
    if bool(copies):
        raise UnsupportedModelError(
            f"some of the {key.shape[1]} key heads are copies of each other, but neither the layer "
            "nor its config says how many there are: pass num_key_value_heads= to patch_model"
        )
    layer.head_order = _DISTINCT
