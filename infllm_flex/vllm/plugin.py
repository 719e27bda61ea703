"""The plugin's entry: registers the backend, and lets models that have settings use it.

vLLM loads the plugin in every process and for every model. A model without settings must not notice
it, whatever the version of vLLM.
"""

from __future__ import annotations

import functools
from typing import Any

import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger

from infllm_flex.vllm.announcement import describe_served
from infllm_flex.vllm.refusals import check_server, not_served
from infllm_flex.vllm.rotation import check_rotation
from infllm_flex.vllm.settings import STAY_DENSE
from infllm_flex.vllm.version import SERVED_VERSION, is_served_version
from infllm_flex.vllm.vllm_config import (
    FULL,
    choose_page_size,
    move_sparse_config,
    read_served,
    server_facts,
)

_BACKEND = "infllm_flex.vllm.backend.InfLLMBackend"

_log = init_logger("vllm.infllm_flex")


def register() -> None:
    """Do all that vLLM needs to serve models with settings. vLLM calls this in each process."""
    if getattr(EngineArgs.create_engine_config, "is_infllm_flex", False):
        return
    if is_served_version(vllm.__version__):
        _register_backend()
    _prepare_configurations()


def prepare(vllm_config: Any) -> None:
    """Choose the backend for the layers of a model that has settings; leave other models alone.

    Args:
        vllm_config: A new ``VllmConfig``, changed in place.

    Raises:
        ValueError: Something that was asked for cannot be served, or vLLM is of another version.
    """
    move_sparse_config(vllm_config)
    served = read_served(vllm_config)
    if served is None:
        return
    if not is_served_version(vllm.__version__):
        raise ValueError(
            f"this infllm-flex serves models in vLLM {SERVED_VERSION}, got {vllm.__version__}: "
            f"install vllm=={SERVED_VERSION}.*; {STAY_DENSE}"
        )
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    choose_page_size(vllm_config, served.config)
    facts = server_facts(vllm_config)
    check_server(facts, served)
    check_rotation(vllm_config.model_config.hf_text_config, served.config)
    _check_registration()
    vllm_config.attention_config.backend_per_kind[FULL] = AttentionBackendEnum.CUSTOM
    for line in describe_served(served, facts.page_size):
        _log.info(line)


def _register_backend() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():  # else _check_registration objects
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    if current_platform.is_cpu():
        _choose_custom_on_cpu()


def _check_registration() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    path = AttentionBackendEnum.CUSTOM.get_path()
    if path != _BACKEND:
        raise ValueError(
            f"the attention backend CUSTOM is {path}, of another plugin: leave that out by "
            "VLLM_PLUGINS=infllm_flex"
        )


def _prepare_configurations() -> None:
    """Let every configuration that vLLM makes of its arguments go through `prepare`."""
    make = EngineArgs.create_engine_config

    @functools.wraps(make)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        vllm_config = make(self, *args, **kwargs)
        prepare(vllm_config)
        return vllm_config

    create_engine_config.is_infllm_flex = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def _choose_custom_on_cpu() -> None:
    """Make vLLM's CPU platform heed the choice of CUSTOM, as its CUDA platform does.

    It would use its own backend, whatever was chosen. Replacing that backend in vLLM's registry
    would reach models without settings, too.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    choose = CpuPlatform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        custom = AttentionBackendEnum.CUSTOM
        if selected_backend is not custom or custom.get_path() != _BACKEND:
            return choose(cls, selected_backend, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(not_served(f"this layer: {', '.join(reasons)}"))
        return selected_backend.get_path()

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
