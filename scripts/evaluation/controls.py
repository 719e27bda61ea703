"""Settings of the controls: attention to as many tokens as a sparse one, without its selection."""

from __future__ import annotations

from dataclasses import replace

from infllm_flex.config import InfLLMConfig


def nearest_only(attention: InfLLMConfig) -> InfLLMConfig:
    """Return settings with the same budget, all of it forced: the first block and the nearest."""
    # The smallest number of blocks beside the window: the first ones and the query's own.
    topk = attention.init_blocks + 1
    size = (attention.num_selected - topk) * attention.block_size
    return replace(attention, topk=topk, window_size=size)


def window_only(attention: InfLLMConfig) -> InfLLMConfig:
    """Return `nearest_only` with the fewest compressed keys, since scores decide nothing here."""
    block = attention.block_size
    return replace(nearest_only(attention), kernel_size=block, kernel_stride=block)
