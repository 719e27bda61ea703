"""Run an action when a module of another package is imported, without importing it."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_log = logging.getLogger(__name__)


def when_imported(module: str, action: Callable[[], None], what: str) -> None:
    """Call ``action`` now if a module is imported, else at the end of its import.

    transformers has no entry point for plug-ins, and importing it early would make ``import
    infllm_flex`` take seconds for users who do not need it.

    Args:
        module: Full name.
        action: Takes no argument. Its ImportError becomes a warning, so that the import of the
            other package succeeds.
        what: Name of the feature that is missing after an ImportError.
    """
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _ActAfterImport(module, action, what))


class _ActAfterImport(MetaPathFinder):
    """Finds one module as Python does, makes its loader call the action, and removes itself."""

    def __init__(self, module: str, action: Callable[[], None], what: str) -> None:
        self._module, self._action, self._what = module, action, what

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for the module; None for every other module."""
        if fullname != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            try:
                self._action()
            except ImportError as error:
                _log.warning("%s is not available: %s", self._what, error)

        # The loader itself is changed, so that its other methods (`get_source`) still work.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
