"""A config that names our attention function for one model, and shares all else with its original.

transformers looks the attention function up by a name in the config. Several models may hold one
config object, so the name cannot be written there: it would switch all of them. A view is an object
of its own with the attributes of the original (one ``__dict__``), held by those modules of one
model that look something up under the name: attention layers, and modules that make masks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

# The attention implementation a model had before -> the name it has while patched. The previous one
# stays readable from the name, so that undoing needs no memory of it.
PATCHED_NAMES = {"sdpa": "infllm_flex", "eager": "infllm_flex_eager"}
PREVIOUS_NAMES = {name: previous for previous, name in PATCHED_NAMES.items()}

_INTERNAL = "_attn_implementation_internal"  # where transformers keeps the name


class ConfigView:
    """Base of all views; see `view_of`.

    ``model.set_attn_implementation(name)`` writes to the configs that the modules hold, which here
    is the view: the model then attends as it was told. The same written to the original, say by
    another model made of it, changes only what a patched model does below ``dense_len``.
    """

    # Not in the `__dict__`, which belongs to the original.
    __slots__ = ("_infllm_for_masks", "_infllm_name", "_infllm_original", "_infllm_parts")
    _infllm_class: Any  # of the original
    _infllm_for_masks: bool
    _infllm_name: str | None
    _infllm_original: Any
    _infllm_parts: Mapping[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep transformers from making a dataclass of the view's class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain config: what ``type(config)()`` and ``config.from_dict`` ask for."""
        return cls._infllm_class(*args, **kwargs)

    @property
    def _attn_implementation(self) -> str | None:
        own: str | None = self._attn_implementation_internal  # type: ignore[attr-defined]
        name = self._infllm_name
        return own if name is None else PATCHED_NAMES.get(own, name)  # type: ignore[arg-type]

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._infllm_class._attn_implementation.fset(self, value)

    def __setattr__(self, key: str, value: Any) -> None:
        if key == _INTERNAL:
            ours = value in PREVIOUS_NAMES
            object.__setattr__(self, "_infllm_name", value if ours else None)
            if ours:
                return
        super().__setattr__(key, value)

    def __eq__(self, other: object) -> bool:
        return bool(self._infllm_original == original_config(other))

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Any:
        return copy.copy(self._infllm_original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        original, parts = copy.deepcopy((self._infllm_original, self._infllm_parts), memo)
        return view_of(original, self._infllm_name, parts, masked=self._infllm_for_masks)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = (self._infllm_name, self._infllm_parts, self._infllm_for_masks)
        return view_of, (self._infllm_original, *state)


def view_of(
    original: Any,
    name: str | None,
    parts: Mapping[str, Any] | None = None,
    masked: bool = False,
) -> Any:
    """Make a view of a config.

    Args:
        original: The config, no view; an instance of ``PreTrainedConfig``.
        name: What the view says its attention implementation is; None for what the original says.
        parts: Views of some of its sub-configs, by attribute.
        masked: Whether a module makes masks by this view.
    """
    parts = dict(parts or {})
    cls: Any = type(original)
    view = object.__new__(_view_class(cls, tuple(sorted(parts))))
    object.__setattr__(view, "__dict__", original.__dict__)
    object.__setattr__(view, "_infllm_original", original)
    object.__setattr__(view, "_infllm_name", name)
    object.__setattr__(view, "_infllm_parts", parts)
    object.__setattr__(view, "_infllm_for_masks", masked)
    return view


def is_view(config: object) -> bool:
    """Whether a config is a view of another."""
    return isinstance(config, ConfigView)


def original_config(config: Any) -> Any:
    """The config that a view was made of, else the same."""
    return config._infllm_original if isinstance(config, ConfigView) else config


def with_parts(view: Any) -> list[Any]:
    """A view and the views of its sub-configs."""
    return [view, *(each for part in view._infllm_parts.values() for each in with_parts(part))]


def is_used_for_masks(view: Any) -> bool:
    """Whether a module makes masks by this view."""
    return bool(view._infllm_for_masks)


def mark_used_for_masks(view: Any) -> None:
    """Note that a module makes masks by this view."""
    object.__setattr__(view, "_infllm_for_masks", True)


def rename_view(view: Any, name: str) -> None:
    """Set what a view says its attention implementation is."""
    object.__setattr__(view, "_infllm_name", name)


@functools.cache
def _view_class(cls: Any, parts: tuple[str, ...]) -> Any:
    """One class per class of configs, under its name: by that transformers finds the model's."""
    body = {key: _part(key) for key in parts}
    body |= {"__slots__": (), "_infllm_class": cls, "__doc__": cls.__doc__}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (ConfigView, cls), body)


def _part(key: str) -> Any:
    """The sub-config under ``key``, by its view as long as the original has not got another."""

    def get(self: Any) -> Any:
        held, part = self.__dict__[key], self._infllm_parts[key]
        return part if held is part._infllm_original else held

    def put(self: Any, value: Any) -> None:
        self.__dict__[key] = original_config(value)

    return property(get, put)
