"""Models of any style keep their bits below dense_len, and are sparse from there on."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_flex as ifx
from tests.patch.masked_sdpa import masked_sdpa
from tests.patch.models import EVERYTHING, LONG, SETTINGS, SHORT, equal, tokens
from tests.patch.plain_models import STYLES, Args, CachedHeads, RepeatedHeads, plain_model


def run(model, length):
    """Logits, then the gradient of every parameter."""
    model.zero_grad()
    out = model(tokens(length))
    torch.nn.functional.cross_entropy(out.flatten(0, 1), tokens(length).flatten()).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("style", STYLES)
class TestStyles:
    def test_below_dense_len_every_bit_is_that_of_the_unpatched_model(self, style):
        model = plain_model(style)
        plain = run(model, SHORT)
        ifx.patch_model(model, SETTINGS)
        assert equal(run(model, SHORT), plain)

    def test_with_every_block_selected_sparse_equals_dense(self, style):
        model = plain_model(style)
        plain = run(model, LONG)
        ifx.patch_model(model, EVERYTHING)
        assert_close(run(model, LONG), plain)

    def test_at_length_groups_attend_to_their_selected_blocks(self, style, monkeypatch):
        model = plain_model(style)
        plain = run(model, LONG)
        ifx.patch_model(model, SETTINGS)
        ours = run(model, LONG)
        kv_heads = []

        def reference(query, key, value, config, *, scale):
            kv_heads.append(key.shape[1])
            return masked_sdpa(query, key, value, config, scale=scale)

        monkeypatch.setattr("infllm_flex.patch.sdpa_calls.infllm_attention", reference)
        assert_close(ours, run(model, LONG))
        groups = {"fused": 4, "one head of keys": 1}
        assert kv_heads == [groups.get(style, 2)] * 2
        assert (ours[0] - plain[0]).abs().max() > 1e-2

    def test_unpatching_leaves_no_trace(self, style):
        model = plain_model(style)
        plain, before = run(model, LONG), traces(model)
        ifx.patch_model(model, SETTINGS)
        assert list(model.state_dict()) == before[1]
        assert traces(model) != before
        assert ifx.unpatch_model(model) is model
        assert traces(model) == before
        assert equal(run(model, LONG), plain)


def traces(model):
    """Classes and attribute names of every module; names of the state."""
    modules = [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]
    return modules, list(model.state_dict())


def test_a_deep_copy_uses_its_own_weights_and_settings():
    model = ifx.patch_model(plain_model(), SETTINGS)
    sparse = model(tokens(LONG))
    twin = copy.deepcopy(model)
    ifx.unpatch_model(model)
    assert torch.equal(twin(tokens(LONG)), sparse)
    with torch.no_grad():
        twin.h[0].attn.c_proj.weight.zero_()
    assert not torch.equal(twin(tokens(LONG)), sparse)


def test_a_pickled_model_is_patched():
    model = ifx.patch_model(plain_model(), SETTINGS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    for twin in twins:
        assert torch.equal(twin(tokens(LONG)), model(tokens(LONG)))
        assert type(ifx.unpatch_model(twin).h[0].attn) is type(plain_model().h[0].attn)


def test_patching_again_changes_settings_and_layers():
    model = ifx.patch_model(plain_model(), SETTINGS)
    once = model(tokens(LONG))
    assert torch.equal(ifx.patch_model(model, SETTINGS)(tokens(LONG)), once)
    assert not torch.equal(ifx.patch_model(model, SETTINGS, topk=3)(tokens(LONG)), once)
    ifx.patch_model(model, SETTINGS, attention_modules="h.1.attn")
    assert [row.name for row in ifx.describe(model) if row.sparse] == ["h.1.attn"]
    assert torch.equal(ifx.patch_model(model, SETTINGS)(tokens(LONG)), once)


def test_other_models_of_the_same_class_are_untouched():
    model, other = plain_model(), plain_model()
    plain = other(tokens(LONG))
    ifx.patch_model(model, SETTINGS)
    model(tokens(LONG))
    assert torch.equal(other(tokens(LONG)), plain)


def test_dense_inside_the_block():
    model = plain_model()
    plain = model(tokens(LONG))
    ifx.patch_model(model, SETTINGS)
    with ifx.dense(model):
        assert torch.equal(model(tokens(LONG)), plain)
    assert not torch.equal(model(tokens(LONG)), plain)


def test_printed_models_look_as_before():
    model = plain_model()
    before = repr(model)
    assert repr(ifx.patch_model(model, SETTINGS)) == before


class NoHint(RepeatedHeads):
    """Does not say how many key heads there are."""

    def __init__(self):
        super().__init__()
        self.hyper = self.__dict__.pop("args")

    def __getattr__(self, name):
        return self.hyper if name == "args" else super().__getattr__(name)


def test_heads_that_only_the_user_knows():
    model, known = plain_model(NoHint), plain_model("repeated")
    with pytest.raises(
        ifx.UnsupportedModelError, match=r"copies of each other.*num_key_value_heads"
    ):
        ifx.patch_model(model, SETTINGS)(tokens(LONG))
    ifx.patch_model(model, SETTINGS, num_key_value_heads=2)
    assert torch.equal(model(tokens(LONG)), ifx.patch_model(known, SETTINGS)(tokens(LONG)))


def test_heads_that_the_user_has_wrong():
    model = ifx.patch_model(plain_model(), SETTINGS, num_key_value_heads=2)
    with pytest.raises(ifx.UnsupportedModelError, match="keys of 4 heads are not 2 expanded ones"):
        model(tokens(LONG))


def test_a_number_of_heads_that_is_none():
    with pytest.raises(ValueError, match="num_key_value_heads must be a positive integer, got 0"):
        ifx.patch_model(plain_model(), num_key_value_heads=0)


def test_attributes_of_the_layer_go_before_the_config():
    model = plain_model(lambda: RepeatedHeads(Args(n_heads=4, n_kv_heads=1)))
    ifx.patch_model(model, SETTINGS)
    model(tokens(LONG))
    layer = model.h[0].attn.infllm_layer
    assert (layer.query_heads, layer.kv_heads, layer.head_order) == (4, 1, "runs")


class TestStaticCache:
    """Prefill and decode through a cache of fixed size, each step masked to the keys so far."""

    def decode(self, model, ids, prefill=80):
        steps = [torch.arange(prefill), *torch.arange(prefill, ids.shape[1])[:, None]]
        with torch.no_grad():
            return torch.cat([model(ids[:, step], step) for step in steps], dim=1)

    def test_below_dense_len_every_bit_is_that_of_the_unpatched_model(self):
        model = plain_model(CachedHeads)
        plain = self.decode(model, tokens(SHORT))
        ifx.patch_model(model, SETTINGS)
        assert torch.equal(self.decode(model, tokens(SHORT)), plain)

    def test_steps_past_dense_len_equal_one_forward(self):
        model = ifx.patch_model(plain_model(CachedHeads, layers=1), SETTINGS, dense_len=-1)
        whole = self.decode(model, tokens(LONG), prefill=LONG)
        assert_close([self.decode(model, tokens(LONG), prefill=100)], [whole])
        ifx.patch_model(model, SETTINGS)
        dense_then_sparse = self.decode(model, tokens(LONG))
        assert_close([dense_then_sparse[:, SHORT:]], [whole[:, SHORT:]])
        with ifx.dense(model):
            dense = self.decode(model, tokens(LONG))
        assert torch.equal(dense_then_sparse[:, : SHORT - 1], dense[:, : SHORT - 1])


def test_decoding_with_a_growing_cache_equals_one_forward():
    class Growing(nn.Module):
        """A layer that decodes one token per call."""

        def __init__(self):
            super().__init__()
            self.qkv, self.keys, self.values = nn.Linear(64, 192), None, None

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
            if self.keys is not None:
                k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
            self.keys, self.values = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)

    torch.manual_seed(0)
    layer = ifx.patch_model(Growing(), SETTINGS, dense_len=-1)
    x = torch.randn(1, LONG, 64)
    with torch.no_grad():
        whole = layer(x)
        layer.keys = layer.values = None
        steps = [layer(x[:, :100]), *(layer(x[:, t : t + 1]) for t in range(100, LONG))]
    torch.testing.assert_close(torch.cat(steps, 2), whole, rtol=1e-4, atol=1e-5)


def assert_close(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4)
