"""`score_dims` is for models that rotate dim i with i + D / 2 over whole heads; others say so."""

import copy
import sys
import types

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import infllm_flex as ifx
from infllm_flex.vllm.rotation import check_rotation, is_known_to_suit
from tests.patch.models import SETTINGS, build, logits

SCORED = {**SETTINGS, "kernel_size": 1, "kernel_stride": 1, "pool_queries": True}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 32}
ROTATE_OTHERWISE = [
    ("GPTNeoX", {}, "8 of its 32 head dims rotate"),
    ("Phi", {}, "16 of its 32 head dims rotate"),
    ("Cohere", {}, "its rotate_half rotates other dims together"),
    ("Glm", HEADS, "its rotate_half rotates other dims together"),
    ("SmolLM3", {}, "its code rotates only if self.use_rope"),
    ("GPT2", {"n_embd": 64, "n_head": 2}, "its code has no function rotate_half"),
]


def config_of(family, **changes):
    return getattr(transformers, f"{family}Config")(**SIZES | changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("Qwen3", HEADS),
        ("Gemma", HEADS),
        ("Gemma3Text", {**HEADS, "layer_types": ["sliding_attention", "full_attention"]}),
        ("Granite", {}),
        ("Phi3", {}),
    ],
)
def test_models_that_rotate_halves_are_scored_by_a_part_of_the_dims(family, changes):
    config = config_of(family, **changes)
    check_rotation(config, ifx.InfLLMConfig(**SCORED, score_dims=8))
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(200)[None] % 64
    results = {}
    for dims in (0, 8):
        ifx.patch_model(model, {**SCORED, "score_dims": dims})
        results[dims] = model(ids).logits
    assert not torch.equal(results[8], results[0])


@pytest.mark.parametrize(("family", "changes", "reason"), ROTATE_OTHERWISE)
def test_models_that_rotate_otherwise_are_refused(family, changes, reason):
    config = config_of(family, **changes)
    model = AutoModelForCausalLM.from_config(config)
    ifx.patch_model(model, SCORED)
    settings = {**SCORED, "score_dims": 8}
    with pytest.raises(ValueError, match=rf"over whole heads.*{reason}; set score_dims=0"):
        ifx.patch_model(model, settings)
    assert not any(row.config.score_dims for row in ifx.describe(model) if row.config)
    with pytest.raises(ValueError, match=f"InfLLM-V2 in vLLM: .*{reason}"):
        check_rotation(config, ifx.InfLLMConfig(**settings))


def test_frequencies_that_rise_are_refused():
    model = build()
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.flip(0)
    with pytest.raises(ValueError, match="its rotary frequencies do not fall from dim to dim"):
        ifx.patch_model(model, {**SCORED, "score_dims": 8})


def test_more_dims_than_a_head_has_are_refused():
    model = build()
    with pytest.raises(ValueError, match=r"less than the head dim.*got 64 for heads of"):
        ifx.patch_model(model, {**SCORED, "score_dims": 64})


class Tower(nn.Module):
    """Another rotary embedding in the same model, as a vision tower has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(3))


def test_the_frequencies_of_a_tower_do_not_count():
    model = build()
    model.model.vision = nn.ModuleDict({"rotary_emb": Tower()})
    expected = logits(ifx.patch_model(build(), {**SCORED, "score_dims": 8}), 200)
    ifx.patch_model(model, {**SCORED, "score_dims": 8})
    assert torch.equal(logits(model, 200), expected)


def test_a_subclass_in_another_file_is_read_by_its_base():
    class OwnAttention(transformers.models.llama.modeling_llama.LlamaAttention):
        pass

    model = build()
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    ifx.patch_model(model, {**SCORED, "score_dims": 8})


def test_a_checkpoint_carries_the_setting(tmp_path):
    model = ifx.patch_model(build(), {**SCORED, "score_dims": 8})
    model.config.sparse_config = ifx.InfLLMConfig(**SCORED, score_dims=8).to_sparse_config()
    model.save_pretrained(tmp_path)
    again = ifx.patch_model(LlamaForCausalLM.from_pretrained(tmp_path).eval())
    assert again.model.layers[0].self_attn.infllm_layer.config.score_dims == 8


def test_serving_asks_transformers_and_leaves_the_config_alone():
    config = config_of("Llama")
    before = copy.deepcopy(config.to_dict())
    check_rotation(config, ifx.InfLLMConfig(**SCORED, score_dims=8))
    assert config.to_dict() == before
    unknown = transformers.PretrainedConfig()
    check_rotation(unknown, ifx.InfLLMConfig(**SCORED))  # nothing is asked
    with pytest.raises(ValueError, match="score_dims cannot be checked: transformers makes no"):
        check_rotation(unknown, ifx.InfLLMConfig(**SCORED, score_dims=8))


WIDER = {"hidden_size": 128}  # 64 dims in each of two heads


@pytest.mark.parametrize(
    ("family", "changes", "dims"),
    [
        ("Llama", WIDER, 32),
        ("Qwen3", {"head_dim": 128}, 32),
        ("Llama", {}, 0),  # heads of 32 dims: there are no more
        *(
            (family, changes | {"head_dim": 64} | WIDER, 0)
            for family, changes, _ in ROTATE_OTHERWISE
        ),
    ],
)
def test_without_settings_a_part_of_the_dims_is_scored_where_it_is_known_which(
    family, changes, dims
):
    config = config_of(family, **changes)
    patched = ifx.patch_model(AutoModelForCausalLM.from_config(config))
    row = next(row for row in ifx.describe(patched) if row.config)
    assert row.config.score_dims == dims
    assert ("every key scored in a part of the head dims" in row.origin) == (dims > 0)
    assert is_known_to_suit(config, 32) == (dims > 0)


def test_every_layer_must_have_more_dims():
    model = AutoModelForCausalLM.from_config(config_of("Llama", **WIDER))
    model.model.layers[1].self_attn.head_dim = 32
    patched = ifx.patch_model(model)
    assert {row.config.score_dims for row in ifx.describe(patched)} == {0}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Llama", {}, None),
        ("Gemma3Text", {**HEADS, "layer_types": ["sliding_attention", "full_attention"]}, None),
        ("GPTNeoX", {}, "0.25 of its head dims rotate"),
        ("Phi", {}, "0.5 of its head dims rotate"),
        ("Cohere", {}, "its rotate_half rotates other dims together"),
    ],
)
def test_layers_that_are_switched_one_by_one_are_asked_too(family, changes, reason):
    """With attn_implementation="infllm_flex" the model is not reached from its layers."""
    ids = torch.arange(200)[None] % 64
    config = config_of(family, **changes)
    config.sparse_config = {**SCORED, "score_dims": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="infllm_flex").eval()
    if reason is not None:
        with pytest.raises(ValueError, match=rf"over whole heads.*{reason}; set score_dims=0"):
            model(ids)
        return
    torch.manual_seed(0)
    patched = ifx.patch_model(AutoModelForCausalLM.from_config(config).eval())
    assert torch.equal(model(ids).logits, patched(ids).logits)


def test_layers_that_stay_as_they_were_are_not_asked():
    config = config_of("Llama", **WIDER, sparse_config={**SCORED, "score_dims": 8})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="infllm_flex").eval()
    skipped = model.model.layers[0].self_attn
    skipped.is_causal = False
    skipped.config = copy.deepcopy(skipped.config)
    skipped.config.rope_parameters["partial_rotary_factor"] = 0.5
    model(torch.arange(200)[None] % 64)
    assert "not causal" in ifx.describe(model)[0].status
    assert ifx.describe(model)[1].sparse


def test_a_forward_in_another_file_may_rotate_otherwise():
    class OwnAttention(transformers.models.llama.modeling_llama.LlamaAttention):
        """Rotates nothing."""

        def forward(self, hidden_states, attention_mask=None, **kwargs):
            shape = (*hidden_states.shape[:2], -1, self.head_dim)
            q, k, v = (
                x(hidden_states).view(shape).transpose(1, 2)
                for x in (self.q_proj, self.k_proj, self.v_proj)
            )
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            out, weights = attend(self, q, k, v, attention_mask)
            return self.o_proj(out.flatten(2)), weights

    model = build()
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    ifx.patch_model(model, {**SCORED, "score_dims": 0})
    with pytest.raises(ValueError, match="its code has no function rotate_half"):
        ifx.patch_model(model, {**SCORED, "score_dims": 8})


class TerseConfig(transformers.LlamaConfig):
    """Writes its JSON in its own way."""

    def to_json_string(self):
        return "{}"


class HubConfig(transformers.PreTrainedConfig):
    """For a model whose code lies beside its weights."""

    model_type = "code_of_its_own"


def test_serving_asks_no_one_but_transformers(monkeypatch):
    """Odd configs are not known to rotate halves; before, they ended in errors or in a prompt."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    assert not is_known_to_suit(TerseConfig(**SIZES), 8)
    assert not is_known_to_suit(types.SimpleNamespace(head_dim=64), 8)
    code = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    assert not is_known_to_suit(HubConfig(auto_map=code), 8)
    config = config_of("Llama")
    config.notes = {"a set has no JSON"}
    assert is_known_to_suit(config, 8)


def test_serving_needs_no_attention_that_a_config_names():
    config = config_of("Llama", attn_implementation="flash_attention_2")
    assert is_known_to_suit(config, 8)
    check_rotation(config, ifx.InfLLMConfig(**SCORED, score_dims=8))


def test_nothing_is_known_of_a_model_without_a_layer_that_can_be_sparse():
    config = transformers.FalconConfig(alibi=True, num_hidden_layers=1)
    assert not is_known_to_suit(config, 8)
    with pytest.raises(ValueError, match=r"no layer of .* can be sparse; set score_dims=0"):
        check_rotation(config, ifx.InfLLMConfig(**SCORED, score_dims=8))


def test_beside_the_rules_scoring_it_may_be_named_alone():
    model = ifx.patch_model(build(), score_dims=8)
    config = model.model.layers[0].self_attn.infllm_layer.config
    assert config.score_dims == 8
    assert config.kernel_size == 1
    assert config.pool_queries
    wide = AutoModelForCausalLM.from_config(config_of("Llama", head_dim=256))
    with pytest.raises(ValueError, match=r"must be 0 \(all\) where pool_queries is false, got 8"):
        ifx.patch_model(wide, score_dims=8)


def test_what_is_said_of_the_settings_follows_an_override():
    model = AutoModelForCausalLM.from_config(config_of("Llama", **WIDER))
    for settings, dims in (({"score_dims": 0}, 0), ({"score_dims": 8}, 8), ({}, 32)):
        [row, _] = ifx.describe(ifx.patch_model(model, **settings))
        assert row.config.score_dims == dims
        assert ("in a part of the head dims" in row.origin) == (dims > 0)


def test_code_without_source_is_refused(monkeypatch):
    made = types.ModuleType("made_at_run_time")
    made.rotate_half = transformers.models.llama.modeling_llama.rotate_half
    monkeypatch.setitem(sys.modules, made.__name__, made)
    model = build()
    attention = type(model.model.layers[0].self_attn)
    own = type("OwnAttention", (attention,), {"__module__": made.__name__})
    for layer in model.model.layers:
        layer.self_attn.__class__ = own
    with pytest.raises(ValueError, match=r"\(OwnAttention\): its source cannot be read; set"):
        ifx.patch_model(model, {**SCORED, "score_dims": 8})
