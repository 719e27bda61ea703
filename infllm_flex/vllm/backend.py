"""The attention backend that vLLM asks about its abilities, its pages and its batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import PagedBatch, window_entries
from infllm_flex.vllm.attention import InfLLMAttention
from infllm_flex.vllm.page_layout import extra_elements, fitting_page, smallest_page
from infllm_flex.vllm.refusals import not_served
from infllm_flex.vllm.vllm_config import current_settings

_LARGEST_HEAD = 256


class InfLLMBackend(AttentionBackend):
    """InfLLM-V2 for the layers that attend to all earlier tokens."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """The name of the member of vLLM's list of backends that stands for plugins."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[InfLLMAttention]:
        """The attention of a layer."""
        return InfLLMAttention

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """Class that makes the metadata of a step."""
        return StepBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether heads have a size that the kernels know."""
        return head_size <= _LARGEST_HEAD

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors may leave out what lies behind a page's keys and values."""
        return False

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Page sizes: whole blocks before vLLM has chosen one, then any, for pages stay whole."""
        config = _current_settings()
        if kv_cache_spec is not None or config is None:
            return [MultipleOf(1)]
        return [MultipleOf(smallest_page(config))]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Whether the settings fit a page size; a user may choose pages smaller than a block."""
        config = _current_settings()
        if block_size is None or config is None:
            return True
        try:
            window_entries(config, block_size)
        except ValueError:
            return False
        return True

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The page size where the user names none: whole blocks, at least the default."""
        config = _current_settings()
        return default_block_size if config is None else fitting_page(config, default_block_size)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages whose keys and values are contiguous within each layer."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Make pages longer by the compressed and coarse keys, so that vLLM counts them.

        Raises:
            ValueError: Keys and values differ in size, or the layer changes which keys a batch's
                queries see. For that, vLLM derives a backend from the layer's.
        """
        if cls is not InfLLMBackend:
            raise ValueError(not_served(f"layers that attend by {cls.__name__}"))
        if spec.head_size != spec.head_size_v:
            raise ValueError(
                not_served(
                    f"layers whose keys and values differ in head dim, got {spec.head_size} and "
                    f"{spec.head_size_v}"
                )
            )
        config = _current_settings()
        assert config is not None, "vLLM makes the layers before it asks for their pages"
        sizes = spec.block_size, spec.num_kv_heads, spec.head_size
        device = torch.device(current_platform.device_type)
        extra = extra_elements(config, *sizes, spec.dtype, device)
        size = spec.unpadded_page_size_bytes + extra * spec.dtype.itemsize
        return replace(spec, page_size_padded=size)


@dataclass
class StepMetadata(AttentionMetadata):
    """A step of the server, the same for all layers.

    Attributes:
        batch: The rows.
        num_tokens: Tokens without padding.
    """

    batch: PagedBatch
    num_tokens: int


class StepBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Makes the metadata of a step out of vLLM's."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        """Read the rows; nothing waits for a GPU.

        Args:
            common_prefix_len: Not used.
            common_attn_metadata: vLLM's own.
            fast_build: Not used.
        """
        step = common_attn_metadata
        # Exact for prompts, the only rows with many queries, whose lengths are read.
        host_lengths = step.seq_lens_cpu_upper_bound
        assert host_lengths is not None, "vLLM's model runners keep lengths on the host"
        batch = PagedBatch.of_rows(
            step.block_table_tensor,
            step.seq_lens,
            step.query_start_loc,
            host_lengths.tolist(),
            step.query_start_loc_cpu.tolist(),
        )
        return StepMetadata(batch, step.num_actual_tokens)


def _current_settings() -> InfLLMConfig | None:
    return current_settings(get_current_vllm_config_or_none())
