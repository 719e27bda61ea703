"""Modelling code in checkpoints, written for other versions of transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

import infllm_flex as ifx
from tests.patch.models import CONFIGS, LONG, SETTINGS, SHORT, build, equal, logits


class Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_key_value_groups, self.scaling, self.attention_dropout = 2, 0.25, 0.0
        self.q_proj, self.o_proj = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.k_proj, self.v_proj = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            p(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2) for p in projections
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        out = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(out.flatten(2)), None


class Indexing(Attention):
    """Looks its function up by index, which `set_attn_implementation` refuses."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            p(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2) for p in projections
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), None


class OwnSdpa(Attention):
    """Calls SDPA on repeated keys, as models did before there was a registry."""

    def attend(self, query, key, value, mask, **kwargs):
        key, value = (repeat_kv(x, self.num_key_value_groups) for x in (key, value))
        causal = mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return out.transpose(1, 2)


WAYS = {Indexing: "transformers", OwnSdpa: "F.scaled_dot_product_attention"}


def remote(kind):
    config = CONFIGS["llama"]()
    model = build(config)
    for index, layer in enumerate(model.model.layers):
        attention = kind(config, index)
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention
    return model.eval()


@pytest.mark.parametrize("kind", WAYS)
def test_older_code_attends_as_current_code_does(kind):
    model, current = remote(kind), build()
    assert isinstance(model, LlamaForCausalLM)
    plain = logits(model, SHORT, use_cache=False), logits(model, LONG, use_cache=False)
    ifx.patch_model(model, SETTINGS)
    assert {row.patched_through for row in ifx.describe(model)} == {WAYS[kind]}
    assert torch.equal(logits(model, SHORT, use_cache=False), plain[0])
    ours = logits(model, LONG, use_cache=False)
    theirs = logits(ifx.patch_model(current, SETTINGS), LONG, use_cache=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    ifx.unpatch_model(model)
    unpatched = [logits(model, length, use_cache=False) for length in (SHORT, LONG)]
    assert equal(unpatched, list(plain))
