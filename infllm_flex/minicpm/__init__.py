"""MiniCPM 4 and 4.1 for transformers, without the code that comes in their folders.

``import infllm_flex`` is enough: from then on ``AutoConfig`` and ``AutoModelForCausalLM`` read
folders of ``model_type`` ``minicpm``, also MiniCPM 1 and 2. Their architecture is Granite's, a
Llama whose parts are scaled, so Granite's code of transformers runs it.

A tokenizer loads where transformers has its class, as it has those of the released models; one that
comes with its folder still needs ``trust_remote_code=True`` for ``AutoTokenizer``, or
``PreTrainedTokenizerFast`` where there is a ``tokenizer.json``.
"""

from __future__ import annotations

from infllm_flex.when_imported import when_imported


def register() -> None:
    """Tell transformers' ``AutoConfig`` of MiniCPM. Imports transformers' configurations."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from infllm_flex.minicpm.config import MiniCPMConfig

    if MiniCPMConfig.model_type not in CONFIG_MAPPING:  # else another package was first
        AutoConfig.register(MiniCPMConfig.model_type, MiniCPMConfig)


def register_when_imported() -> None:
    """Register at once if transformers is there, else at the end of its own import."""
    when_imported("transformers.models.auto.configuration_auto", register, "loading MiniCPM")
