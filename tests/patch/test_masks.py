"""Masks that other code reads or edits, and masks that users give as tables."""

import pytest
import torch
from transformers import DynamicCache

import infllm_flex as ifx
from tests.patch.models import CACHE, CONFIGS, SETTINGS, build, tokens

S = 140
IDS = tokens(S, 3)
PADDED = torch.ones(3, S, dtype=torch.long)
PADDED[0, :33] = 0
PADDED[2, 101:] = 0
KEEP = PADDED.bool()
SEEN = []
LOOKS = {
    "clones": lambda mask: mask.clone(),
    "adds": lambda mask: mask + 0 > 0,
    "inverts": lambda mask: ~(~mask),
    "cuts": lambda mask: mask[:, :, :, :S],
    "combines": lambda mask: torch.logical_and(mask, torch.ones_like(mask)),
    "sums": lambda mask: SEEN.append((mask.sum(), mask.dtype, mask.ndim, len(mask))),
    "casts": lambda mask: 1 - mask.to(torch.float32) < 0.5,
    "makes it a bias": lambda mask: bias_of(mask, torch.linspace(0, 1, S)),
    "moves": lambda mask: mask.to(torch.device("cpu")),
    "writes": lambda mask: mask.masked_fill(~mask, False),
}


def bias_of(mask, weights):
    """Doge's mask: weights of the keys, hidden by a bool or additive mask."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, torch.zeros(()), torch.finfo(torch.float32).min)
    return weights.expand(mask.shape[0], 4, S, S).masked_fill(mask[:, :, :, :S] != 0, -1e30)


def look_at_masks_of(model, look):
    """Let a hook on every layer read the mask, and replace it by its result."""

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"]
        made = look(mask)
        return args, {**kwargs, "attention_mask": mask if made is None else made}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("look", LOOKS)
def test_below_dense_len_hooks_that_use_the_mask_get_the_bits_of_the_unpatched_model(look):
    model = build()
    look_at_masks_of(model, LOOKS[look])
    with torch.no_grad():
        plain = model(IDS, attention_mask=PADDED).logits
        ifx.patch_model(model, SETTINGS, dense_len=S + 1)
        assert torch.equal(model(IDS, attention_mask=PADDED).logits, plain)


@pytest.mark.parametrize("dense_len", [S + 1, SETTINGS["dense_len"]])
def test_a_mask_that_a_hook_writes_to_is_never_taken_for_what_it_was(dense_len):
    """The last queries of the third row no longer see the first key."""

    def write(mask):
        mask[2, :, 90:, 0] = False

    model = build()
    look_at_masks_of(model, write)
    with torch.inference_mode():
        plain = model(IDS, attention_mask=PADDED).logits
        ifx.patch_model(model, SETTINGS, dense_len=dense_len)
        if dense_len > S:
            assert torch.equal(model(IDS, attention_mask=PADDED).logits, plain)
        else:
            with pytest.raises(NotImplementedError, match="an attention mask beyond causal"):
                model(IDS, attention_mask=PADDED)


def test_what_a_mask_would_be_costs_no_table(monkeypatch):
    model = ifx.patch_model(build(), SETTINGS)
    seen = []
    look_at_masks_of(model, lambda m: seen.append((m.dtype, m.device, m.shape, m.ndim)))
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", None)
    model(IDS, attention_mask=PADDED)
    assert seen[0] == (torch.bool, torch.device("cpu"), (3, 1, S, S), 4)


def test_at_sparse_length_hooks_may_look_at_the_mask():
    model = ifx.patch_model(build(), SETTINGS)
    with torch.no_grad():
        expected = model(IDS, attention_mask=PADDED).logits
        look_at_masks_of(model, LOOKS["sums"])
        assert torch.equal(model(IDS, attention_mask=PADDED).logits[KEEP], expected[KEEP])


def test_a_hook_that_uses_the_mask_compiles():
    torch.compiler.reset()
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    model = build(config)
    look_at_masks_of(model, LOOKS["combines"])
    with torch.no_grad():
        plain = model(IDS, attention_mask=PADDED).logits
        ifx.patch_model(model, SETTINGS, dense_len=S + 1)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(IDS, attention_mask=PADDED).logits, plain)
    torch.compiler.reset()


CAUSAL = torch.ones(S, S).tril().bool()[None, None]
CAUSAL_MASKS = {
    "bool": CAUSAL.expand(3, -1, -1, -1),
    "one for all rows": CAUSAL,
    "by the least number": torch.zeros(1, 1, S, S).masked_fill(~CAUSAL, torch.finfo().min),
    "by infinity": torch.zeros(3, 1, S, S).masked_fill(~CAUSAL, float("-inf")),
}
_BEYOND = CAUSAL.clone()
_BEYOND[..., 77, 31] = False  # one key of one query
_BIASED = torch.zeros(1, 1, S, S).masked_fill(~CAUSAL, float("-inf"))
_BIASED[..., 77, 31] = -0.5
_WEAK = torch.zeros(1, 1, S, S).masked_fill(~CAUSAL, float("-inf"))
_WEAK[..., 31, 77] = -3.0
OTHER_MASKS = {"a hole": _BEYOND, "a bias": _BIASED, "a look ahead": _WEAK}


@pytest.fixture(scope="module")
def both_ways():
    """A model of one layer, and the same model compiled."""
    torch.compiler.reset()
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    model = ifx.patch_model(build(config), SETTINGS)
    yield model, torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.parametrize("mask", CAUSAL_MASKS)
def test_a_causal_mask_given_whole_is_served_compiled_or_not(mask, both_ways):
    with torch.no_grad():
        expected = both_ways[0](IDS).logits
        for call in both_ways:
            assert_close(call(IDS, attention_mask=CAUSAL_MASKS[mask]).logits, expected)


@pytest.mark.parametrize("mask", OTHER_MASKS)
def test_any_other_mask_given_whole_is_refused_compiled_or_not(mask, both_ways):
    for call in both_ways:
        with (
            pytest.raises(
                (NotImplementedError, RuntimeError), match="attention mask beyond causal"
            ),
            torch.no_grad(),
        ):
            call(IDS, attention_mask=OTHER_MASKS[mask])


def test_a_mask_given_whole_is_looked_at_once_for_all_layers(monkeypatch):

    from infllm_flex.patch.huggingface import unsupported_calls

    look, calls = unsupported_calls.is_plain_causal, []
    monkeypatch.setattr(
        unsupported_calls, "is_plain_causal", lambda mask: calls.append(1) or look(mask)
    )
    model = ifx.patch_model(build(), SETTINGS)
    mask = CAUSAL.clone()
    model(IDS, attention_mask=mask)
    assert len(calls) == 1
    mask.numpy()[..., 50, 3] = False  # which no counter of changes shows
    with pytest.raises(NotImplementedError, match="an attention mask beyond causal"):
        model(IDS, attention_mask=mask)


def test_a_causal_mask_is_looked_at_in_parts(monkeypatch):
    from infllm_flex.patch import causal_masks

    monkeypatch.setattr(causal_masks, "_ENTRIES_AT_ONCE", 9 * S)
    for mask in CAUSAL_MASKS.values():
        assert causal_masks.is_plain_causal(mask)
    for mask in OTHER_MASKS.values():
        assert not causal_masks.is_plain_causal(mask)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)


def test_a_causal_mask_given_whole_keeps_documents_apart():
    model, lengths = ifx.patch_model(build(), SETTINGS), [110, 30]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        ours = model(IDS, position_ids=positions, attention_mask=CAUSAL).logits
        theirs = torch.cat([model(part).logits for part in IDS.split(lengths, 1)], 1)
        assert_close(ours, theirs)


STEP_MASKS = {
    "a bias": torch.linspace(-1, -0.1, S + 1).expand(3, 1, 1, -1),
    "a bias of a head": torch.zeros(3, 4, 1, S + 1).index_fill(1, torch.tensor(2), -0.3),
    "a key that one head does not see": torch.ones(3, 4, 1, S + 1)
    .index_fill(1, torch.tensor(3), 0)
    .bool(),
}


@pytest.mark.parametrize("mask", STEP_MASKS)
def test_a_step_of_generation_refuses_what_is_more_than_padding(mask):
    model = ifx.patch_model(build(), SETTINGS)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(IDS, **{CACHE: cache})
        with pytest.raises(RuntimeError, match="rows that are padded on the left"):
            model(IDS[:, :1], attention_mask=STEP_MASKS[mask], **{CACHE: cache})
