"""Make ``attn_implementation="infllm_flex"`` known to transformers, now or when it is imported."""

from __future__ import annotations

from infllm_flex.patch.huggingface.attention import (
    attention_forward,
    attention_forward_of_eager,
)
from infllm_flex.patch.huggingface.config_view import PATCHED_NAMES
from infllm_flex.patch.huggingface.mask_verdicts import causal_mask_for_training
from infllm_flex.when_imported import when_imported


def register() -> None:
    """Enter our names into transformers' attention and mask registries. Imports transformers.

    All names share one attention function and one mask function. The name tells what a model had
    before. The mask function returns None for a plain causal sequence of any length.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(PATCHED_NAMES["sdpa"], attention_forward)
    AttentionInterface.register(PATCHED_NAMES["eager"], attention_forward_of_eager)
    for name in PATCHED_NAMES.values():
        AttentionMaskInterface.register(name, causal_mask_for_training)


def register_when_imported() -> None:
    """Register now if transformers has been imported, else at the end of its import."""
    when_imported("transformers.modeling_utils", register, "attn_implementation='infllm_flex'")
