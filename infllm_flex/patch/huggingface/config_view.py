"""A view of a config: it names our attention function and shares all other attributes.

transformers looks the attention function up by a name in the config. Several models may hold one
config object, and a name written there would switch all of them. A view is an object of its own
that shares the ``__dict__`` of the original. It is held by those modules of one model that look
something up under the name: attention layers, and modules that make masks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, NoReturn

from infllm_flex.patch.huggingface.transformers_private import (
    implementation_attribute,
    override_implementation,
)

# From the attention implementation that a model had before to its name while patched. The previous
# one can be read from the name, so that undoing needs no memory of it.
PATCHED_NAMES = {"sdpa": "infllm_flex", "eager": "infllm_flex_eager"}
PREVIOUS_NAMES = {name: previous for previous, name in PATCHED_NAMES.items()}


class ConfigView:
    """Base of all views; see `view_of`.

    ``model.set_attn_implementation(name)`` writes to the configs that the modules hold, here the
    view, and the model obeys. If the name is written to the original, say by another model that
    holds it, a patched model obeys below ``dense_len`` only.
    """

    # Slots, because the `__dict__` belongs to the original.
    __slots__ = ("_infllm_for_masks", "_infllm_name", "_infllm_original", "_infllm_parts")
    _infllm_class: Any  # of the original
    _infllm_for_masks: bool
    _infllm_name: str | None
    _infllm_original: Any
    _infllm_parts: Mapping[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep transformers from making a dataclass of the view's class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain config, for ``type(config)()`` and ``config.from_dict``."""
        return cls._infllm_class(*args, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        if key == implementation_attribute():
            if self._infllm_name is not None and str(value).startswith("paged|"):
                self._refuse_paged(str(value))
            ours = value in PREVIOUS_NAMES
            object.__setattr__(self, "_infllm_name", value if ours else None)
            if ours:
                return
        super().__setattr__(key, value)

    def _refuse_paged(self, name: str) -> NoReturn:
        assert self._infllm_name is not None
        previous = PREVIOUS_NAMES[self._infllm_name]
        # transformers has written the name to the original, which shares its attributes.
        super().__setattr__(implementation_attribute(), previous)
        raise NotImplementedError(
            f"continuous batching cannot attend sparsely by attn_implementation={name!r}: it needs "
            f"transformers 5.20 or newer and a model loaded with attn_implementation='sdpa', got "
            f"{previous!r}; or call unpatch_model"
        )

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


def _rename(name: str | None, stored: str | None) -> str | None:
    return stored if name is None else PATCHED_NAMES.get(stored, name)  # type: ignore[arg-type]


override_implementation(ConfigView, "_infllm_name", _rename)


def view_of(
    original: Any,
    name: str | None,
    parts: Mapping[str, Any] | None = None,
    masked: bool = False,
) -> Any:
    """Make a view of a config.

    Args:
        original: The config, no view; an instance of ``PreTrainedConfig``.
        name: Name of the view's attention implementation; None for the original's.
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
    """The config that a view was made of; a config that is no view itself."""
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
    """Set the name of a view's attention implementation."""
    object.__setattr__(view, "_infllm_name", name)


@functools.cache
def _view_class(cls: Any, parts: tuple[str, ...]) -> Any:
    """One view class per class of configs, of the same name, by which transformers finds models."""
    body = {key: _part(key) for key in parts}
    body |= {"__slots__": (), "_infllm_class": cls, "__doc__": cls.__doc__}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (ConfigView, cls), body)


def _part(key: str) -> Any:
    """A property for the sub-config ``key``: its view, unless the original got another one."""

    def get(self: Any) -> Any:
        held, part = self.__dict__[key], self._infllm_parts[key]
        return part if held is part._infllm_original else held

    def put(self: Any, value: Any) -> None:
        self.__dict__[key] = original_config(value)

    return property(get, put)
