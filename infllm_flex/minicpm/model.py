"""MiniCPM's causal LM: the code of transformers' Granite under MiniCPM's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.granite.modeling_granite import GraniteForCausalLM

from infllm_flex.minicpm.code_files import copy_code, refer_to_hub
from infllm_flex.minicpm.config import MiniCPMConfig
from infllm_flex.minicpm.rotary import LongRotaryEmbedding
from infllm_flex.patch import patch_model


class MiniCPMForCausalLM(GraniteForCausalLM):
    """MiniCPM; `from_pretrained` makes it sparse if its folder has a ``sparse_config``."""

    config_class = MiniCPMConfig
    # Folders of older versions hold buffers that are computed here.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\."]  # noqa: RUF012

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]  # has what Granite's code reads
        if config.rope_parameters["rope_type"] == "longrope":
            self.model.rotary_emb = LongRotaryEmbedding(config)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Read a folder, and patch the model if the folder has a ``sparse_config``.

        Args:
            args: As transformers takes them.
            output_loading_info: Whether to return the loading info, too.
            kwargs: As transformers takes them; ``sparse_config=None`` leaves the model dense.

        Raises:
            ValueError: The tensors of the folder do not match the model.
            UnsupportedModelError: There is a ``sparse_config``, but the ``attn_implementation``
                cannot be made sparse.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        _check_tensors(info)
        # Resolved now: later, another folder of this name may exist.
        source, auto_map = model.config.name_or_path, getattr(model.config, "auto_map", None)
        if source and auto_map:
            model.config.auto_map = refer_to_hub(source, auto_map)
        if model.config.sparse_config is not None:
            patch_model(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Write the model in MiniCPM's own format, with the code that its ``auto_map`` names.

        Other programs run that code. It is copied if the model was read from a folder that has it,
        and referred to by the model's name if it is on the hub.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes the files that all processes share.
            args: As transformers takes them.
            kwargs: As transformers takes them.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        source, auto_map = self.config.name_or_path, getattr(self.config, "auto_map", None)
        if source and auto_map and is_main_process:
            copy_code(Path(source), Path(save_directory), auto_map)


def _check_tensors(info: dict[str, Any]) -> None:
    problems = [
        f"{what} {', '.join(sorted(info[kind])[:3])}{' ...' if len(info[kind]) > 3 else ''}"
        for kind, what in (("missing_keys", "has no"), ("unexpected_keys", "has the unknown"))
        if info[kind]
    ]
    if problems:
        raise ValueError(
            f"the folder {' and '.join(problems)}: it is of another architecture, incomplete, or "
            "quantised though its config.json does not say so; use the folder as released"
        )


AutoModelForCausalLM.register(MiniCPMConfig, MiniCPMForCausalLM, exist_ok=True)
