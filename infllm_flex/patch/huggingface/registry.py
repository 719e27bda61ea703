"""Make ``attn_implementation="infllm_flex"`` known to transformers, now or when it is imported."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from infllm_flex.patch.huggingface.attention import attention_forward
from infllm_flex.patch.huggingface.layers import NAMES
from infllm_flex.patch.huggingface.masks import causal_mask

_log = logging.getLogger(__name__)
_REGISTRY_MODULE = "transformers.modeling_utils"


def register() -> None:
    """Enter our names into transformers' attention and mask registries. Imports transformers.

    All of them stand for one attention function and one mask function: None for a plain causal
    sequence, whatever its length.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for name in NAMES.values():
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, causal_mask)


def register_when_imported() -> None:
    """Register at once if transformers is there, else at the end of its own import.

    transformers has no entry point for plug-ins, and importing it here would make ``import
    infllm_flex`` take seconds for those who never need it.
    """
    if _REGISTRY_MODULE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Finds one module as Python would, lets its loader call `register`, then is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Claim the module with the registries; None for every other."""
        if fullname != _REGISTRY_MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            try:
                register()
            except ImportError as error:
                # Not our import to break: this transformers is older than the registries.
                _log.warning("attn_implementation='infllm_flex' is not available: %s", error)

        # On the loader itself: whatever else it can do, like handing out source, it still does.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
