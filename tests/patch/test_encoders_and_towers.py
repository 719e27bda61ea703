"""Layers that are no part of a causal language model stay as they were, and say why."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    SplinterConfig,
    SplinterModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

import infllm_flex as ifx
from infllm_flex.patch.override import attend_through
from infllm_flex.patch.skip_reasons import LEARNED_MASK, OTHER_SEQUENCE, TOWER, UNDECLARED
from tests.patch.families.tiny import build as build_type
from tests.patch.families.tiny import make_config
from tests.patch.models import CACHE, EVERYTHING, LONG, SETTINGS, SHORT, build, logits, tokens
from tests.patch.plain_models import FusedHeads, plain_model

# Warnings of other people's models are not judged here.
pytestmark = pytest.mark.filterwarnings("ignore")

SPARSE = "sparse"
CROSS = "cross-attention"
# By type: what a part of the name of a layer says about it. The first match counts.
MULTIMODAL = {
    "deepseek_vl_hybrid": {"high_res": LEARNED_MASK, "vision": "not causal", "language": SPARSE},
    "granite_speech": {"projector": "not causal", "encoder": TOWER, "language": SPARSE},
    "llama4": {"vision": TOWER, "layers.0": "chunked attention", "language": SPARSE},
    "llava": {"vision": "not causal", "language": SPARSE},
    "mllama": {"vision": UNDECLARED, "cross_attn": CROSS, "language": SPARSE},
    "phi4_multimodal": {"image": TOWER, "audio": TOWER, "model.layers": SPARSE},
    "qwen2_audio": {"audio": "not causal", "language": SPARSE},
    "qwen3_vl": {"visual": "not causal", "language": SPARSE},
}
ENCODERS = {
    "AlignTextModel": UNDECLARED,
    "BertModel": "not causal",
    "ClapTextModel": UNDECLARED,
    "CLIPVisionModel": "not causal",
    "LayoutLMModel": UNDECLARED,
    "LightGlueForKeypointMatching": OTHER_SEQUENCE,
    "MarkupLMModel": UNDECLARED,
    "SamVisionModel": LEARNED_MASK,
    "SplinterModel": UNDECLARED,
}


def statuses(model):
    """The reason of each layer, or `SPARSE`, by name."""
    rows = ifx.describe(model)
    return {r.name: SPARSE if r.sparse else r.status.partition(": left")[0] for r in rows}


@pytest.mark.parametrize(("model_type", "expected"), MULTIMODAL.items(), ids=MULTIMODAL)
def test_only_the_language_model_of_a_multimodal_one_is_sparse(model_type, expected):
    config = make_config(model_type)
    if model_type == "mllama":
        config.text_config.cross_attention_layers = [1]
    name = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type]
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(config)
    ifx.patch_model(model, SETTINGS)
    found = statuses(model)
    words = {layer: next(w for part, w in expected.items() if part in layer) for layer in found}
    assert found == words
    assert set(found.values()) == set(expected.values())


@pytest.mark.parametrize(("name", "reason"), ENCODERS.items(), ids=ENCODERS)
def test_an_encoder_is_refused(name, reason):
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls._from_config(cls.config_class())
    with pytest.raises(ifx.UnsupportedModelError, match=f"none of which can be sparse: .*{reason}"):
        ifx.patch_model(model, SETTINGS)
    assert set(statuses(model).values()) <= {reason, "not causal"}


def test_a_model_of_towers_and_windows_is_refused():
    name = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["unlimited_ocr"]
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(make_config("unlimited_ocr"))
    with pytest.raises(ifx.UnsupportedModelError, match=rf"2 x {LEARNED_MASK}, .* sliding window"):
        ifx.patch_model(model, SETTINGS)


def mllama(**kwargs):
    vision = MllamaVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=64,
        vision_output_dim=64,
        image_size=56,
        patch_size=14,
        max_num_tiles=4,
        intermediate_layers_indices=[1],
    )
    text = MllamaTextConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        cross_attention_layers=[1],
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=63)
    model = MllamaForConditionalGeneration._from_config(config, **kwargs).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:  # zero at first: no image would be seen
            nn.init.ones_(parameter)
    return model


def images(length):
    """Four tiles of 24 vision tokens each: 96 for a row, as many as `dense_len`."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.ones(2, length, 1, 4)
    visible[:, : length // 2, :, 2:] = 0
    return {
        "pixel_values": torch.randn(2, 1, 4, 3, 56, 56, generator=generator),
        "aspect_ratio_ids": torch.full((2, 1), 6),
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.int64),
        "cross_attention_mask": visible,
    }


class TestMllama:
    """Its cross-attention has a cache like its self-attention, of vision tokens."""

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_short_text_over_a_long_image_keeps_its_bits(self, implementation):
        model = mllama(attn_implementation=implementation)
        plain = logits(model, SHORT, **images(SHORT))
        ifx.patch_model(model, SETTINGS)
        assert torch.equal(logits(model, SHORT, **images(SHORT)), plain)

    def test_long_text_is_sparse_in_self_attention_alone(self):
        model = mllama()
        plain = logits(model, LONG, **images(LONG))
        ifx.patch_model(model, SETTINGS)
        assert (logits(model, LONG, **images(LONG)) - plain).abs().max() > 1e-2
        ifx.patch_model(model, EVERYTHING)
        ours = logits(model, LONG, **images(LONG))
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)

    def test_steps_past_dense_len(self):
        model = mllama()
        x, seen = tokens(LONG), images(LONG)
        visible = seen.pop("cross_attention_mask")
        with torch.no_grad():
            plain = model(x, **seen, cross_attention_mask=visible).logits
            ifx.patch_model(model, EVERYTHING)
            first = model(x[:, :90], **seen, cross_attention_mask=visible[:, :90], use_cache=True)
            cache = {CACHE: first.past_key_values}
            steps = [
                model(
                    x[:, i : i + 1],
                    **cache,
                    cross_attention_mask=visible[:, i : i + 1],
                    use_cache=True,
                ).logits
                for i in range(90, LONG)
            ]
        torch.testing.assert_close(torch.cat(steps, 1), plain[:, 90:], rtol=1e-3, atol=1e-3)


def test_an_image_longer_than_dense_len_keeps_its_bits():
    model = build_type("phi4_multimodal")
    tower = model.model.embed_tokens_extend.image_embed.img_processor
    side = tower.config.image_size
    image = torch.randn(1, 3, side, side)
    assert (side // tower.config.patch_size) ** 2 > SETTINGS["dense_len"]
    with torch.no_grad():
        plain = tower(image).last_hidden_state
        ifx.patch_model(model, SETTINGS)
        assert torch.equal(tower(image).last_hidden_state, plain)


class TestDeclared:
    """Where no language model is around a layer, its own attributes decide."""

    def splinter(self):
        size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
        size |= {"num_hidden_layers": 2, "num_attention_heads": 4}
        return SplinterModel(SplinterConfig(**size)).eval()

    def test_the_error_says_what_to_do(self):
        with pytest.raises(ifx.UnsupportedModelError, match="set is_causal = True on a layer that"):
            ifx.patch_model(self.splinter(), SETTINGS)

    def test_a_layer_that_is_declared_causal(self):
        model = self.splinter()
        model.encoder.layer[0].attention.self.is_causal = True
        ifx.patch_model(model, SETTINGS)
        assert list(statuses(model).values()) == [SPARSE, UNDECLARED]

    def test_a_decoder_whose_layers_lost_the_attribute(self):
        model = build()
        for layer in model.model.layers:
            del layer.self_attn.is_causal
        ifx.patch_model(model, SETTINGS)
        assert set(statuses(model).values()) == {SPARSE}


class Learning(FusedHeads):
    """Adds a learned bias, of a parameter, to its logits."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(LONG, LONG))
        self.table = nn.Embedding(LONG, LONG)

    def shift(self, q, bias):
        return bias[: q.shape[2], : q.shape[2]]

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        bias = None
        if x.shape[1] > 1:
            relative = self.shift(q, self.bias)
            bias = relative[None, None].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class LearningByTable(Learning):
    """The same, of a submodule."""

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        bias = self.table(torch.arange(x.shape[1]))[None, None, :, : x.shape[1]]
        y = F.scaled_dot_product_attention(q, k, v, bias)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class StoredMask(Learning):
    """Its causal mask is a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.causal = nn.Parameter(torch.ones(LONG, LONG).tril().log(), requires_grad=False)

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        mask = self.causal[: x.shape[1], : x.shape[1]]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MadeMask(Learning):
    """A method makes its causal mask for the queries, which a trained layer computed."""

    def mask_for(self, q):
        return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        mask = self.mask_for(q)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class TestMasksOfPlainLayers:
    """A learned bias is told from a causal mask by where it comes from."""

    @pytest.mark.parametrize("kind", [Learning, LearningByTable])
    def test_a_learned_bias_is_refused(self, kind):
        with pytest.raises(ifx.UnsupportedModelError, match=f"2 x {LEARNED_MASK}"):
            ifx.patch_model(plain_model(kind), SETTINGS)

    @pytest.mark.parametrize("kind", [StoredMask, MadeMask])
    def test_a_causal_mask_of_the_layer_itself(self, kind):
        model = plain_model(kind)
        plain = model(tokens(LONG))
        ifx.patch_model(model, SETTINGS)
        assert not torch.equal(model(tokens(LONG)), plain)
        ifx.patch_model(model, EVERYTHING)
        torch.testing.assert_close(model(tokens(LONG)), plain, rtol=1e-3, atol=1e-4)


class Cacheless(nn.Module):
    """A layer without a cache, in the place of one layer of a Llama."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        q, k, v = self.qkv(hidden_states).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2)), None


class CachelessByMask(Cacheless):
    """The same, without a word that it is causal."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        q, k, v = self.qkv(hidden_states).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.out(y.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize(("kind", "status"), [(Cacheless, SPARSE), (CachelessByMask, TOWER)])
def test_sdpa_without_a_cache_beside_layers_with_one(kind, status):
    model = build()
    model.model.layers[0].self_attn = kind()
    ifx.patch_model(model, SETTINGS)
    assert list(statuses(model).values()) == [status, SPARSE]
    ifx.patch_model(model, SETTINGS)  # its class is another one now
    assert list(statuses(model).values()) == [status, SPARSE]


def test_a_tower_is_named_when_attention_is_replaced():
    model = ifx.patch_model(build_type("phi4_multimodal"), SETTINGS)
    with (
        pytest.raises(ValueError, match=f"image_embed.* cannot be replaced: {TOWER}"),
        attend_through(model, lambda number: None),
    ):
        pass
