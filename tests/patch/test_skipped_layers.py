"""Which layers stay dense, and the reasons that are given."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from transformers import (
    DeepseekV3Config,
    FalconH1Config,
    Gemma4TextConfig,
    MistralConfig,
    Phi3Config,
    Zamba2Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import infllm_flex as ifx
from tests.patch.families.observations import alone, difference, packed
from tests.patch.families.tiny import build as build_type
from tests.patch.models import (
    CACHE,
    CONFIGS,
    EVERYTHING,
    LONG,
    SETTINGS,
    SHORT,
    build,
    logits,
    tokens,
)
from tests.patch.plain_models import WIDTH, FusedHeads, plain_model

_SIZE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
}


def deepseek(**changes):
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    kwargs = {**_SIZE, **_MLA, **experts, "first_k_dense_replace": 2, "v_head_dim": 16}
    return DeepseekV3Config(**{**kwargs, **changes})


def gemma4(**changes):
    kwargs = {
        **_SIZE,
        "head_dim": 16,
        "global_head_dim": 512,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    }
    return Gemma4TextConfig(**{**kwargs, **changes})


class TestHeads:
    """Head sizes are known before a model runs."""

    @pytest.mark.parametrize("config", [deepseek(), deepseek(v_head_dim=32)], ids=["less", "more"])
    def test_values_of_another_size(self, config):
        with pytest.raises(
            ifx.UnsupportedModelError,
            match=rf"2 x values of {config.v_head_dim} per head, keys of 24; sparse attention",
        ):
            ifx.patch_model(build(config), SETTINGS)

    def test_values_of_the_same_size_are_served(self):
        model = build(deepseek(v_head_dim=24))
        plain = logits(model, LONG)
        ifx.patch_model(model, EVERYTHING)
        torch.testing.assert_close(logits(model, LONG), plain, rtol=1e-3, atol=1e-4)

    def test_a_large_head(self):
        with pytest.raises(
            ifx.UnsupportedModelError,
            match="1 x sliding window 32, 1 x heads of 512, more than 256",
        ):
            ifx.patch_model(build(gemma4()), SETTINGS)

    @pytest.mark.parametrize("kv_heads", [1, 2])
    def test_layers_that_differ_in_heads_are_served(self, kv_heads):
        changes = {"global_head_dim": 32, "attention_k_eq_v": True}
        model = build(gemma4(**changes, num_global_key_value_heads=kv_heads))
        plain = logits(model, LONG)
        ifx.patch_model(model, EVERYTHING)
        assert [row.sparse for row in ifx.describe(model)] == [False, True]
        torch.testing.assert_close(logits(model, LONG), plain, rtol=1e-3, atol=1e-4)

    def test_one_large_head_is_left(self):
        config = CONFIGS["llama"]()
        model = build(config)
        attention = model.model.layers[0].self_attn
        attention.v_proj = torch.nn.Linear(64, 64, bias=False)
        ifx.patch_model(model, SETTINGS)
        assert [row.status for row in ifx.describe(model)] == [
            "values of 32 per head, keys of 16: left as it was",
            "sparse from 96 tokens on: 5 blocks of 16",
        ]

    def test_what_no_attribute_told_is_told_by_the_call(self):
        attention = ifx.patch_model(build(), SETTINGS).model.layers[0].self_attn
        attend = ALL_ATTENTION_FUNCTIONS["infllm_flex"]
        query, key, value = (
            torch.randn(1, heads, LONG, size) for heads, size in ((4, 16), (2, 16), (2, 32))
        )
        with pytest.raises(
            NotImplementedError, match="cannot serve values of 32 per head, keys of 16 yet"
        ):
            attend(attention, query, key, value, None)

    def test_outside_transformers(self):
        class Wide(FusedHeads):
            def __init__(self):
                super().__init__()
                self.head_dim, self.v_head_dim = 16, 32

        with pytest.raises(
            ifx.UnsupportedModelError, match="2 x values of 32 per head, keys of 16"
        ):
            ifx.patch_model(plain_model(Wide), SETTINGS)
        with pytest.raises(ifx.UnsupportedModelError, match="values of 8 per head, keys of 16"):
            ifx.patch_model(plain_model(Narrow), SETTINGS, example_inputs=tokens(8))
        model = ifx.patch_model(plain_model(Narrow), SETTINGS)
        model(tokens(SHORT))
        with pytest.raises(
            ifx.UnsupportedModelError, match="values of 8 per head, keys of 16: run"
        ):
            model(tokens(LONG))


class Narrow(FusedHeads):
    """Values of half the width."""

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v[..., :8], is_causal=True)
        return self.c_proj(F.pad(y, (0, 8)).transpose(1, 2).flatten(2))


HYBRIDS = {
    "falcon_h1": lambda: FalconH1Config(
        **{**_SIZE, "head_dim": 16},
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=16,
    ),
    "zamba2": lambda: Zamba2Config(
        **{**_SIZE, "num_hidden_layers": 3},
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        num_mem_blocks=1,
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_d_state=8,
        use_mem_rope=True,
        chunk_size=16,
    ),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_attention_beside_a_state_space_model_is_served(name):
    model = build(HYBRIDS[name]())
    plain = [logits(model, length, use_cache=False) for length in (SHORT, LONG)]
    ifx.patch_model(model, SETTINGS)
    assert all(row.sparse for row in ifx.describe(model))
    assert torch.equal(logits(model, SHORT, use_cache=False), plain[0])
    assert (logits(model, LONG, use_cache=False) - plain[1]).abs().max() > 1e-3
    ifx.patch_model(model, EVERYTHING)
    ours = logits(model, LONG, use_cache=False)
    torch.testing.assert_close(ours, plain[1], rtol=1e-3, atol=1e-4)


class TestWindows:
    """A window counts if a sequence of the model can be longer than it."""

    def phi3(self, window, **changes):
        kwargs = {**_SIZE, "sliding_window": window, **changes}
        return build(Phi3Config(**kwargs, bos_token_id=1, eos_token_id=2))

    def test_none_that_no_sequence_exceeds(self):
        model = self.phi3(512)
        mask = torch.ones(2, LONG, dtype=torch.int64)
        mask[0, :20] = 0
        packed = {"position_ids": torch.arange(LONG)[None] % 50, "use_cache": False}
        calls = [{}, {"attention_mask": mask}, packed]
        plain = [logits(model, LONG, **call) for call in calls]
        ifx.patch_model(model, EVERYTHING)
        assert all(row.sparse for row in ifx.describe(model))
        for call, theirs in zip(calls, plain, strict=True):
            real = call.get("attention_mask", torch.ones_like(mask)).bool()
            ours = logits(model, LONG, **call)
            torch.testing.assert_close(ours[real], theirs[real], rtol=1e-3, atol=1e-4)
        ifx.patch_model(model, SETTINGS)
        assert (logits(model, LONG) - plain[0]).abs().max() > 1e-2

    def test_compiled_as_one_graph_under_such_a_window(self):
        torch.compiler.reset()
        model = ifx.patch_model(self.phi3(512), SETTINGS)
        function = torch.compile(model, fullgraph=True, backend="aot_eager")
        mask = torch.ones(2, LONG, dtype=torch.int64)
        mask[0, :20] = 0
        for call in ({}, {"attention_mask": mask}):
            ours, theirs = (logits(f, LONG, use_cache=False, **call) for f in (function, model))
            real = call.get("attention_mask", torch.ones_like(mask)).bool()
            torch.testing.assert_close(ours[real], theirs[real], rtol=1e-3, atol=1e-4)
        torch.compiler.reset()

    def test_generation_under_such_a_window(self):
        model = self.phi3(512)
        x = tokens(LONG)
        plain = logits(model, LONG)
        ifx.patch_model(model, EVERYTHING)
        with torch.no_grad():
            cache = model(x[:, :100]).past_key_values
            steps = [model(x[:, i : i + 1], **{CACHE: cache}).logits for i in range(100, LONG)]
        torch.testing.assert_close(torch.cat(steps, 1), plain[:, 100:], rtol=1e-3, atol=1e-4)

    def test_one_that_a_scaled_sequence_exceeds(self):
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
        rope["rope_theta"] = 1e4
        config = MistralConfig(**_SIZE, sliding_window=512, rope_parameters=rope)
        with pytest.raises(ifx.UnsupportedModelError, match="2 x sliding window 512"):
            ifx.patch_model(build(config), SETTINGS)

    def test_a_sequence_longer_than_the_model_allows(self):
        model = ifx.patch_model(self.phi3(120, max_position_embeddings=100), SETTINGS)
        logits(model, 110)
        with pytest.raises(NotImplementedError, match="cannot serve a sliding window yet: got 128"):
            logits(model, LONG)


class Biased(FusedHeads):
    """Its mask is a ``CausalBias`` of PyTorch."""

    def __init__(self, bias=causal_lower_right):
        super().__init__()
        self.bias = bias

    def forward(self, x, past=None):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        mask = self.bias(q.shape[2], k.shape[2])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class TestCausalBias:
    @pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
    def test_it_is_plain_causal(self, bias):
        torch.manual_seed(0)
        layer, plain = Biased(bias), FusedHeads()
        plain.load_state_dict(layer.state_dict())
        x = torch.randn(2, LONG, WIDTH)
        dense = layer(x)
        for module in (layer, plain):
            ifx.patch_model(module, SETTINGS)
        assert torch.equal(layer(x), plain(x))
        assert not torch.equal(layer(x), dense)
        with ifx.dense(layer):
            assert torch.equal(layer(x), dense)

    @pytest.mark.parametrize("settings", [SETTINGS, EVERYTHING])
    def test_new_queries_stand_at_the_end(self, settings):
        torch.manual_seed(0)
        layer = Biased()
        x = torch.randn(2, LONG, WIDTH)
        _, k, v = layer.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        ifx.patch_model(layer, settings)
        ours = layer(x[:, 100:], past=(k[:, :, :100], v[:, :, :100]))
        torch.testing.assert_close(ours, layer(x)[:, 100:], rtol=1e-4, atol=1e-5)

    def test_queries_aligned_at_the_first_key_see_only_as_many(self):
        torch.manual_seed(0)
        layer = Biased(causal_upper_left)
        x = torch.randn(2, LONG, WIDTH)
        _, k, v = layer.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        plain = layer(x[:, :30], past=(k, v))
        ifx.patch_model(layer, SETTINGS)
        assert torch.equal(layer(x[:, :30], past=(k, v)), plain)

    def test_compiled(self):
        torch.compiler.reset()
        torch.manual_seed(0)
        layer = ifx.patch_model(Biased(), SETTINGS)
        x = torch.randn(2, LONG, WIDTH)
        function = torch.compile(layer, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(function(x), layer(x), rtol=1e-4, atol=1e-5)
        torch.compiler.reset()


@pytest.mark.parametrize("lengths", [(40, 23, 30), (32, 64)], ids=["within", "at the start"])
def test_documents_over_a_cache_begin_where_chunks_do(lengths):
    model = ifx.patch_model(build_type("llama4_text"), SETTINGS)  # chunks of 32
    expected = alone(lengths)(model)
    assert difference(packed(lengths, by_bounds=False)(model), expected, exact=False) is None
    over_a_cache = packed(lengths, by_bounds=False, use_cache=True)
    if lengths[0] % 32:
        with pytest.raises(ValueError, match=r"chunks .*: pass use_cache=False"):
            over_a_cache(model)
    else:
        assert difference(over_a_cache(model), expected, exact=False) is None
