"""Models of known libraries are patched at their attention, or refused when patching."""

import copy
import pickle

import pytest
import torch

import infllm_flex as ifx
from tests.patch.library_models import (
    LIBRARY_MODELS,
    GptStyle,
    HeadsFirst,
    MaskedKernel,
    TitanStyle,
    TitanTokensFirst,
    TokensFirst,
    TuneStyle,
    XStyle,
)
from tests.patch.masked_sdpa import masked_sdpa
from tests.patch.models import EVERYTHING, LONG, SETTINGS, SHORT, equal, tokens
from tests.patch.plain_models import plain_model
from tests.patch.test_sdpa_adapter import assert_close, run, traces


@pytest.mark.parametrize("library", LIBRARY_MODELS)
class TestSeams:
    def test_is_told_by_its_structure(self, library):
        model = ifx.patch_model(plain_model(LIBRARY_MODELS[library]), SETTINGS)
        assert {row.patched_through for row in ifx.describe(model)} == {library}
        assert [row.sparse for row in ifx.describe(model)] == [True, True]

    def test_below_dense_len_every_bit_is_that_of_the_unpatched_model(self, library):
        model = plain_model(LIBRARY_MODELS[library])
        plain = run(model, SHORT)
        ifx.patch_model(model, SETTINGS)
        assert equal(run(model, SHORT), plain)

    def test_with_every_block_selected_sparse_equals_dense(self, library):
        model = plain_model(LIBRARY_MODELS[library])
        plain = run(model, LONG)
        ifx.patch_model(model, EVERYTHING)
        assert_close(run(model, LONG), plain)

    def test_at_length_groups_attend_to_their_selected_blocks(self, library, monkeypatch):
        model = plain_model(LIBRARY_MODELS[library])
        plain = run(model, LONG)
        ours = run(ifx.patch_model(model, SETTINGS), LONG)
        kv_heads = []

        def reference(query, key, value, config, *, scale):
            kv_heads.append(key.shape[1])
            return masked_sdpa(query, key, value, config, scale=scale)

        monkeypatch.setattr("infllm_flex.patch.sdpa_calls.infllm_attention", reference)
        assert_close(ours, run(model, LONG))
        assert kv_heads == [2, 2]
        assert (ours[0] - plain[0]).abs().max() > 1e-2

    def test_unpatching_leaves_no_trace(self, library):
        model = plain_model(LIBRARY_MODELS[library])
        plain, before = run(model, LONG), traces(model)
        ifx.patch_model(model, SETTINGS)
        with ifx.dense(model):
            assert equal(run(model, LONG), plain)
        ifx.unpatch_model(model)
        assert traces(model) == before
        assert equal(run(model, LONG), plain)

    def test_a_deep_copy_is_patched_and_independent(self, library):
        model = ifx.patch_model(plain_model(LIBRARY_MODELS[library]), SETTINGS)
        sparse = model(tokens(LONG))
        twin = copy.deepcopy(model)
        ifx.unpatch_model(model)
        assert torch.equal(twin(tokens(LONG)), sparse)


def test_a_pickled_model_is_patched():
    model = ifx.patch_model(plain_model(GptStyle), SETTINGS)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens(LONG)), model(tokens(LONG)))


def test_tokens_before_heads():
    model = plain_model(lambda: TitanTokensFirst(TokensFirst))
    same = ifx.patch_model(plain_model(lambda: TitanStyle(HeadsFirst)), SETTINGS)
    ifx.patch_model(model, SETTINGS)
    torch.testing.assert_close(model(tokens(LONG)), same(tokens(LONG)))


LEFT = {
    "bidirectional torchtune": (lambda: TuneStyle(is_causal=False), "not causal"),
    "soft-capped litgpt": (lambda: GptStyle(softcap=30.0), "logits soft-capped at 30"),
    "windowed litgpt": (lambda: GptStyle(window=True), "sliding window 32"),
    "masked torchtitan": (lambda: TitanStyle(MaskedKernel), "MaskedKernel, a masked kernel"),
    "bidirectional x-transformers": (lambda: XStyle(causal=False), "not causal"),
    "x-transformers by hand": (lambda: XStyle(flash=False), "build it with attn_flash=True"),
}


@pytest.mark.parametrize("made", LEFT.values(), ids=LEFT)
def test_what_a_layer_cannot_be_sparse_for_is_told_when_patching(made):
    make, reason = made
    with pytest.raises(
        ifx.UnsupportedModelError, match=f"2 attention layers, none .* 2 x .*{reason}"
    ):
        ifx.patch_model(plain_model(make), SETTINGS)


def test_layers_that_can_be_are_and_the_others_stay(caplog):
    windows = iter([True, False])
    model = plain_model(lambda: GptStyle(window=next(windows)))
    plain = run(model, LONG)
    with caplog.at_level("INFO", logger="infllm_flex"):
        ifx.patch_model(model, EVERYTHING)
    assert [record.getMessage() for record in caplog.records] == [
        "Decoder: 1 of 2 attention layers sparse from 96 tokens on "
        "(settings: given to patch_model); 1 left as they were: sliding window 32",
        "on a CPU sparse attention is measured to be faster from 16384 tokens on",
    ]
    assert [row.status for row in ifx.describe(model)] == [
        "sliding window 32: left as it was",
        "sparse from 96 tokens on: 9 blocks of 16",
    ]
    assert_close(run(model, LONG), plain)
    ifx.unpatch_model(model)
    assert {row.patched_through for row in ifx.describe(model)} == {""}
