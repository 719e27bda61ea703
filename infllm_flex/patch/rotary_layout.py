"""Whether a model's rotary embedding rotates dims as `score_dims` expects.

The dims of the lowest frequencies lie elsewhere where a rotary embedding rotates neighbours, or a
part of the head only. In layers that do not rotate at all no dim has a frequency. Scores by the
wrong dims select the wrong blocks, and nothing else would show it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.class_swap import original_class
from infllm_flex.patch.head_dims import read_head_dim

_ROTATE, _APPLY = "rotate_half", "rotary"
_SHARE = "partial_rotary_factor"
# Models whose code asks the second give the embedding to all layers or to none; others leave it out
# for single layers.
_GIVEN, _HAS = "position_embeddings is not None", "self.rotary_emb is not None"


def check_score_dims(
    model: nn.Module | None, layers: Mapping[str, nn.Module], config: InfLLMConfig
) -> None:
    """Raise a ValueError where ``score_dims`` is set and does not fit the layers.

    Args:
        model: The model around the layers; None where it cannot be reached from them.
        layers: The layers that become sparse, by name.
        config: Their settings.
    """
    if not config.score_dims:
        return
    for name, layer in layers.items():
        head_dim = read_head_dim(layer)
        if head_dim is not None:
            config.num_score_dims(head_dim)
        reason = _other_rotation(model, name, layer, head_dim)
        if reason is not None:
            raise ValueError(
                f"score_dims needs a rotary embedding that rotates dim i with i + D / 2, over "
                f"whole heads of D, in every sparse layer; {name} ({type(layer).__name__}): "
                f"{reason}; set score_dims=0, which scores by all dims"
            )


def suits_score_dims(
    model: nn.Module | None, layers: Mapping[str, nn.Module], num_dims: int
) -> bool:
    """Whether all layers have more head dims, and are known to rotate i with i + D / 2 of all D.

    Args:
        model: The model around the layers; None where it cannot be reached from them.
        layers: The layers, by name.
        num_dims: The head dims to score.
    """
    for name, layer in layers.items():
        head_dim = read_head_dim(layer)
        if head_dim is None or head_dim <= num_dims or head_dim % 2:
            return False
        if _other_rotation(model, name, layer, head_dim) is not None:
            return False
    return bool(layers)


def _other_rotation(
    model: nn.Module | None, name: str, layer: nn.Module, head_dim: int | None
) -> str | None:
    """Why a layer is not known to rotate as expected, in a few words; None if it is."""
    code = _code_of(original_class(layer))
    if code is None:
        return f"its code has no function {_ROTATE}"
    if not _rotates_halves(code):
        return f"its {_ROTATE} rotates other dims together"
    if (condition := _find_condition(code, model is not None)) is not None:
        return condition
    if model is None:
        return _other_share(getattr(layer, "config", None))
    frequencies = list(_frequencies_above(model, name))
    if not frequencies:
        return "its model has no rotary frequencies (a buffer inv_freq)"
    for x in frequencies:
        if head_dim is not None and x.shape[-1] != head_dim // 2:
            return f"{2 * x.shape[-1]} of its {head_dim} head dims rotate"
        if not x.is_meta and bool((x.diff() > 0).any()):
            return "its rotary frequencies do not fall from dim to dim"
    return None


def _code_of(cls: type) -> ModuleType | None:
    """The first module that defines a class or a base of it and has a function `rotate_half`.

    None if a class before that has a ``forward`` of its own, which may rotate otherwise.
    """
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        if hasattr(module, _ROTATE):
            return module
        if "forward" in vars(base):
            return None
    return None


@functools.cache
def _rotates_halves(code: ModuleType) -> bool:
    """Whether a module's `rotate_half` swaps the halves of a vector; signs may be either way."""
    x = torch.arange(1.0, 9.0, device="cpu").view(1, 1, 1, 8)
    try:
        rotated = getattr(code, _ROTATE)(x)
    except Exception:  # whatever other code raises: it is another function
        return False
    return isinstance(rotated, Tensor) and torch.equal(rotated.abs(), x.roll(4, -1))


@functools.cache
def _find_condition(code: ModuleType, has_model: bool) -> str | None:
    """Why a module's layers may not rotate, by its source; None if they always do.

    Args:
        code: The module.
        has_model: Whether the model's frequencies can be looked for.
    """
    try:
        tree = ast.parse(inspect.getsource(code))
    except (OSError, SyntaxError, TypeError):  # TypeError: a module of no file, as in a notebook
        return "its source cannot be read"
    nodes = list(ast.walk(tree))
    tests = {ast.unparse(node) for node in nodes if isinstance(node, ast.Compare)}
    is_given = _GIVEN if has_model and _HAS in tests else None
    for node in nodes:
        if not isinstance(node, ast.If):
            continue
        calls = (x for part in (*node.body, *node.orelse) for x in ast.walk(part))
        if any(isinstance(x, ast.Call) and _applies(x) for x in calls):
            condition = ast.unparse(node.test)
            if condition != is_given:
                return f"its code rotates only if {condition}"
    return None


def _applies(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and _APPLY in call.func.id


def _other_share(config: object) -> str | None:
    """Why the layers of a config are not known to rotate whole heads; None if they are."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    by_kind = [x for x in rope.values() if isinstance(x, Mapping)] if rope else []
    shares = [x.get(_SHARE) for x in (rope or {}, *by_kind)]
    shares += [getattr(config, name, None) for name in (_SHARE, "rotary_pct")]
    if getattr(config, "rope_theta", None) is None and rope is None:
        return "its config says nothing of a rotary embedding"
    other = next((share for share in shares if share not in (None, 1)), None)
    return None if other is None else f"{other:.2g} of its head dims rotate"


def _frequencies_above(model: nn.Module, name: str) -> Iterator[Tensor]:
    """The rotary frequencies that lie beside the layer, or beside a module around it.

    Each has one for two dims in its last dimension; some have a row for short and one for long
    sequences.
    """
    for buffer_name, buffer in model.named_buffers():
        owner, _, own_name = buffer_name.rpartition(".")
        if not own_name.endswith("inv_freq"):
            continue
        around = owner.rpartition(".")[0]
        if not around or f"{name}.".startswith(f"{around}."):
            yield buffer
