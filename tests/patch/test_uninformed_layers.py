"""Documents by positions in models whose layers do not get them, or get several axes."""

import pytest
import torch
from transformers import CTRLConfig, FalconConfig, GPTBigCodeConfig, PersimmonConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextConfig, Qwen2VLTextModel

import infllm_flex as ifx
from infllm_flex.patch.huggingface import documents
from tests.patch.models import CONFIGS, SETTINGS, build, enable_checkpointing, tokens

LENGTHS = (35, 104, 1, 99, 22)

DOCUMENTS = torch.cat([torch.arange(n) for n in LENGTHS])[None]

IDS = tokens(sum(LENGTHS), 1)

_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}

_SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

_COMMON = {"vocab_size": 64, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}

UNINFORMED = {
    "persimmon": lambda: PersimmonConfig(**_COMMON, **_SIZE, intermediate_size=64),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**_COMMON, **_GPT, **_no_dropout("attn", "embd")),
    "ctrl": lambda: CTRLConfig(**_COMMON, **_GPT, dff=64, **_no_dropout("embd")),
    "falcon": lambda: FalconConfig(
        **_COMMON, **_SIZE, num_kv_heads=2, new_decoder_architecture=True
    ),
    "falcon with one key head": lambda: FalconConfig(**_COMMON, **_SIZE),
}


def _no_dropout(*names):
    return {f"{name}_pdrop": 0.0 for name in (*names, "resid")}


def alone(model):
    return torch.cat([model(part).logits for part in IDS.split(list(LENGTHS), 1)], 1)


@pytest.mark.parametrize("dense_len", [SETTINGS["dense_len"], 1000])
@pytest.mark.parametrize("family", UNINFORMED)
def test_layers_without_positions_isolate_documents(family, dense_len):
    model = ifx.patch_model(build(UNINFORMED[family]()), SETTINGS, dense_len=dense_len)
    ones = torch.ones_like(IDS)
    with torch.no_grad():
        expected = alone(model)
        for kwargs in ({}, {"attention_mask": ones}, {"use_cache": False}):
            assert_close(model(IDS, position_ids=DOCUMENTS, **kwargs).logits, expected)


@pytest.mark.parametrize("family", ["persimmon", "falcon"])
def test_layers_without_positions_train(family):
    model = ifx.patch_model(build(UNINFORMED[family]()), SETTINGS).train()

    def gradients(forward):
        model.zero_grad()
        forward().square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(lambda: alone(model))
    enable_checkpointing(model)
    ours = gradients(lambda: model(IDS, position_ids=DOCUMENTS, use_cache=False).logits)
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=2e-3, atol=2e-3 * float(their.abs().max()))


def test_a_recomputed_layer_without_documents_is_refused():
    model = ifx.patch_model(build(UNINFORMED["gpt_bigcode"]()), SETTINGS).train()
    enable_checkpointing(model)
    ones = torch.ones_like(IDS)
    loss = model(IDS, position_ids=DOCUMENTS, attention_mask=ones, use_cache=False).logits.sum()
    with pytest.raises(NotImplementedError, match="pass use_cache=False without an attention_mask"):
        loss.backward()


@pytest.mark.parametrize("family", ["gpt_bigcode", "falcon"])
def test_layers_without_positions_compile(family):
    model = ifx.patch_model(build(UNINFORMED[family]()), SETTINGS)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = alone(model)
        assert_close(compiled(IDS, position_ids=DOCUMENTS, use_cache=False).logits, expected)
        ifx.patch_model(model, SETTINGS, dense_len=1000)
        if family == "falcon":  # which makes a mask for every call
            assert_close(compiled(IDS, position_ids=DOCUMENTS).logits, alone(model))
        else:
            with pytest.raises(RuntimeError, match="pass use_cache=False or cu_seq_lens_q"):
                compiled(IDS, position_ids=DOCUMENTS)
    torch.compiler.reset()


@pytest.mark.parametrize("num_axes", [3, 4])
@pytest.mark.parametrize("dense_len", [SETTINGS["dense_len"], 1000])
def test_positions_of_several_axes_isolate_documents(dense_len, num_axes, monkeypatch):
    """A document holds an image of 4 by 5 tokens. Height and width go back, the text does not."""
    read, calls = documents._read, []
    monkeypatch.setattr(documents, "_read", lambda *args: calls.append(1) or read(*args))
    sections = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = CONFIGS["llama"]().to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept += ("num_attention_heads", "num_key_value_heads", "initializer_range")
    torch.manual_seed(0)
    model = Qwen2VLTextModel(
        Qwen2VLTextConfig(**{name: config[name] for name in kept}, rope_parameters=sections)
    ).eval()
    spatial = DOCUMENTS[None].repeat(3, 1, 1)
    image = slice(50, 70)  # of the second document
    spatial[0, 0, image] = spatial[0, 0, 50]
    spatial[1, 0, image] = spatial[0, 0, 50] + torch.arange(20) // 5
    spatial[2, 0, image] = spatial[0, 0, 50] + torch.arange(20) % 5
    positions = spatial if num_axes == 3 else torch.cat([DOCUMENTS[None], spatial])
    ifx.patch_model(model, SETTINGS, dense_len=dense_len)
    with torch.no_grad():
        ours = model(IDS, position_ids=positions).last_hidden_state
        assert len(calls) == 1
        parts = zip(IDS.split(list(LENGTHS), 1), positions.split(list(LENGTHS), 2), strict=True)
        theirs = [model(ids, position_ids=own).last_hidden_state for ids, own in parts]
        assert_close(ours, torch.cat(theirs, 1))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)
