"""InfLLM-V2: dense-sparse switchable attention for any PyTorch causal LM."""

from infllm_flex.config import InfLLMConfig

__all__ = ["InfLLMConfig"]
