"""Patched models on the meta device and under fake tensors, where there are no values to read."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import infllm_flex as ifx
from tests.patch.models import CONFIGS, FULL_ATTENTION, SETTINGS, build, tokens

S = 130
LENGTHS = {"dense": S + 1, "sparse": SETTINGS["dense_len"]}
PADDED = torch.ones(2, S, dtype=torch.long)
PADDED[0, :40] = 0
KEYWORDS = {
    "nothing": {},
    "positions": {"position_ids": torch.arange(S).view(2, -1).repeat(1, 2)},
    "padding": {"attention_mask": PADDED, "position_ids": torch.arange(S)[None]},
    "bounds": {"cu_seq_lens_q": torch.tensor([0, 20, S], dtype=torch.int32)},
    "no cache": {"use_cache": False, "position_ids": torch.arange(S)[None]},
    "a mask given whole": {"attention_mask": torch.ones(S, S).tril().bool()[None, None]},
}


def batch(keywords):
    return tokens(S, 1 if "cu_seq_lens_q" in keywords else 2)


@pytest.mark.parametrize("dense_len", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_fake_tensors(keywords, dense_len):
    model, ids = build(), batch(keywords)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ifx.patch_model(model, SETTINGS, dense_len=dense_len)
        fake = {
            name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for name, x in keywords.items()
        }
        out = model(mode.from_tensor(ids), **fake)
        assert out.logits.shape == (*ids.shape, 64)
        out.logits.sum().backward()


@pytest.mark.parametrize("dense_len", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_the_meta_device(keywords, dense_len):
    if "use_cache" in keywords:
        pytest.skip("transformers itself reads positions where there is no cache")
    model, ids = build().to("meta"), batch(keywords).to("meta")
    ifx.patch_model(model, SETTINGS, dense_len=dense_len)
    there = {
        name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in keywords.items()
    }
    out = model(ids, **there)
    assert out.logits.shape == (*ids.shape, 64)
    assert out.logits.is_meta


@pytest.mark.parametrize("family", [name for name in FULL_ATTENTION if name != "gpt2"])
def test_every_family_runs_without_values(family):
    """GPT-2 reads its own input, patched or not."""
    with torch.device("meta"):
        model = type(build(family))(CONFIGS[family]())
        ifx.patch_model(model, SETTINGS)
        assert model(torch.zeros(1, S, dtype=torch.long)).logits.is_meta
