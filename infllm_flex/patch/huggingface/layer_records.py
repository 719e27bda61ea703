"""The record of an attention layer, made at its first call if ``patch_model`` never saw it."""

from __future__ import annotations

from torch import nn

from infllm_flex.patch.layer_state import PatchedLayer, get_layer


def get_or_make_layer(module: nn.Module) -> PatchedLayer:
    """The record of an attention layer, made at its first call.

    A model built with ``attn_implementation="infllm_flex"`` has never passed through
    ``patch_model``. Its layers take the settings of their own ``sparse_config``, or those of the
    rule. A layer built from the config view of a patched model stays dense: nobody patched it.
    """
    layer = get_layer(module)
    if layer is None:
        from infllm_flex.patch.huggingface.own_settings import make_own_layer

        layer = make_own_layer(module)
    return layer
