"""MiniCPM 4 and 4.1 for transformers, without the code that comes in their folders.

After ``import infllm_flex``, ``AutoConfig`` and ``AutoModelForCausalLM`` read folders of
``model_type`` ``minicpm``, MiniCPM 1 and 2 included. Their architecture is that of Granite (a Llama
with scale factors), so the code of transformers' Granite runs them.

A tokenizer loads if transformers has its class, as it has for the released models. A tokenizer with
code in its folder still needs ``trust_remote_code=True`` for ``AutoTokenizer``, or
``PreTrainedTokenizerFast`` if there is a ``tokenizer.json``.
"""

from __future__ import annotations

from infllm_flex.minicpm.first_config import before_config
from infllm_flex.when_imported import when_imported


def register() -> None:
    """Register MiniCPM with transformers' ``AutoConfig``. Imports transformers' configurations."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from infllm_flex.minicpm.config import MiniCPMConfig

    if MiniCPMConfig.model_type not in CONFIG_MAPPING:  # otherwise another package was first
        AutoConfig.register(MiniCPMConfig.model_type, MiniCPMConfig)


def register_model() -> None:
    """Register MiniCPM with ``AutoModelForCausalLM``. Imports transformers' model code."""
    import infllm_flex.minicpm.model  # noqa: F401


def register_when_imported() -> None:
    """Register now if transformers is imported, else at the end of its import.

    The model is registered before the first configuration of a MiniCPM is made.
    """
    before_config(register_model)
    when_imported("transformers.models.auto.configuration_auto", register, "loading MiniCPM")
