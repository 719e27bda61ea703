"""InfLLM-V2: dense-sparse switchable attention for any PyTorch causal LM."""

from infllm_flex.attention import infllm_attention
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import CompressedKeys, decode_attention
from infllm_flex.engines.flex_masks import build_block_mask
from infllm_flex.minicpm import register_when_imported as register_minicpm_when_imported
from infllm_flex.patch import UnsupportedModelError, dense, describe, patch_model, unpatch_model
from infllm_flex.patch.huggingface import register_when_imported
from infllm_flex.selection import select_blocks

__version__ = "0.1.0"
__all__ = [
    "CompressedKeys",
    "InfLLMConfig",
    "UnsupportedModelError",
    "build_block_mask",
    "decode_attention",
    "dense",
    "describe",
    "infllm_attention",
    "patch_model",
    "select_blocks",
    "unpatch_model",
]

# Registers `attn_implementation="infllm_flex"` and MiniCPM's folders with transformers.
register_when_imported()
register_minicpm_when_imported()
