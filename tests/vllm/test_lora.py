"""Adapters (LoRA) are served as the patched model with their weights added."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.vllm import served
from tests.vllm.served import SETTINGS, Judge, ask, engine, make_prompts

pytest.importorskip("vllm")

RANK = 8


def write_adapter(folder, model):
    """Random factors for all queries and keys, which decide what is selected."""
    targets = ("q_proj", "k_proj")
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, module in model.named_modules():
        if name.endswith(targets):
            rows, columns = module.weight.shape
            down = torch.randn(RANK, columns, generator=generator) / 16
            up = torch.randn(rows, RANK, generator=generator) / 16
            module.weight.data += up @ down
            factors[f"base_model.model.{name}.lora_A.weight"] = down
            factors[f"base_model.model.{name}.lora_B.weight"] = up
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_requests_with_and_without_an_adapter_have_their_models_log_probabilities(tmp_path):
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    plain, adapter, merged = (tmp_path / name for name in ("plain", "adapter", "merged"))
    served.write_llama(plain)
    model = AutoModelForCausalLM.from_pretrained(plain)
    write_adapter(adapter, model)
    model.save_pretrained(merged)
    prompts = make_prompts(100, 700)
    arguments = {"enable_lora": True, "max_lora_rank": RANK, "enable_prefix_caching": True}
    with engine(plain, SETTINGS, block_size=64, max_num_batched_tokens=200, **arguments) as llm:
        request = LoRARequest("adapter", 1, str(adapter))
        with_adapter = ask(llm, prompts, lora_request=request)
        without = ask(llm, prompts)
    Judge(merged, SETTINGS).check(with_adapter)
    Judge(plain, SETTINGS).check(without)
