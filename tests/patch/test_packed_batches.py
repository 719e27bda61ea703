"""Packed batches: a document gives what it gives alone, in every form of packing."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

import infllm_flex as ifx
from infllm_flex.patch.huggingface import documents
from tests.patch.models import (
    FULL_ATTENTION,
    SETTINGS,
    build,
    enable_checkpointing,
    tokens,
)
from tests.patch.packed import (
    BOUNDS,
    HOLE,
    IDS,
    LENGTHS,
    PACKINGS,
    POSITIONS,
    TOTAL,
    alone,
    assert_close,
    positions_from,
)


@pytest.mark.parametrize("kwargs", PACKINGS.values(), ids=PACKINGS)
def test_packed_documents_give_what_they_give_alone(kwargs):
    model = ifx.patch_model(build(), SETTINGS)
    with torch.no_grad():
        assert_close(model(IDS, **positions_from(kwargs)).logits, alone(model))


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_every_family_isolates_documents(family):
    model = ifx.patch_model(build(family), SETTINGS)
    with torch.no_grad():
        expected = alone(model)
        for kwargs in (PACKINGS["bounds"], PACKINGS["positions"]):
            assert_close(model(IDS, **positions_from(kwargs)).logits, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kwargs", PACKINGS.values(), ids=PACKINGS)
def test_below_dense_len_documents_are_isolated_too(kwargs, implementation):
    model = ifx.patch_model(build(attn_implementation=implementation), SETTINGS, dense_len=1000)
    with torch.no_grad():
        assert_close(model(IDS, **positions_from(kwargs)).logits, alone(model))


@pytest.mark.parametrize("grad", [False, True])
def test_a_dense_call_for_one_sequence_is_launched_while_positions_are_read(grad, monkeypatch):
    """On a GPU, without gradients, and not after a wrong guess. Here the wait is simulated."""
    monkeypatch.setattr(
        documents, "read_flag", lambda flag, call: (call and call.launch(), bool(flag))[1]
    )
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs),
    )
    model = ifx.patch_model(build(attn_implementation="sdpa"), SETTINGS, dense_len=1000)
    num_layers = model.config.num_hidden_layers

    def run(**kwargs):
        calls.clear()
        with torch.set_grad_enabled(grad):
            return model(IDS, **kwargs).logits.detach(), len(calls)

    one, num_calls = run()
    assert num_calls == num_layers
    with torch.no_grad():
        assert torch.equal(one, build(attn_implementation="sdpa")(IDS).logits)
        expected = alone(model)
    for discarded in (not grad, 0):
        packed, num_calls = run(position_ids=POSITIONS.clone())
        assert num_calls == num_layers + discarded
        assert_close(packed, expected)


def test_skipped_layers_isolate_documents():
    model = ifx.patch_model(build("gemma2"), SETTINGS)
    with torch.no_grad():
        for kwargs in PACKINGS.values():
            assert_close(model(IDS, **positions_from(kwargs)).logits, alone(model))


def test_packed_training_gives_the_sum_of_the_documents_gradients():
    model = ifx.patch_model(build(), SETTINGS).train()
    weight = torch.randn(1, TOTAL, 64, generator=torch.Generator().manual_seed(0))

    def gradients(forward):
        model.zero_grad()
        (forward() * weight).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(lambda: alone(model))
    packed = gradients(lambda: model(IDS, **PACKINGS["positions"]).logits)
    enable_checkpointing(model)
    again = gradients(lambda: model(IDS, **PACKINGS["positions"]).logits)
    for ours, recomputed, theirs in zip(packed, again, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(recomputed, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_bounds", [False, True])
def test_the_collator_of_transformers_packs(with_bounds):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=with_bounds)
    examples = [part[0].tolist() for part in IDS.split(list(LENGTHS), 1)]
    batch = collate([{"input_ids": ids} for ids in examples])
    batch.pop("labels")
    model = ifx.patch_model(build(), SETTINGS)
    with torch.no_grad():
        assert_close(model(**batch).logits, alone(model))


def test_the_batch_is_read_once_for_all_layers(monkeypatch):
    from infllm_flex.patch.huggingface import documents

    read, calls = documents._read, []
    monkeypatch.setattr(documents, "_read", lambda *args: calls.append(args) or read(*args))
    model = ifx.patch_model(build(), SETTINGS)
    positions = POSITIONS.clone()
    before = logits_of(model, positions)
    assert len(calls) == 1
    positions.copy_(torch.arange(TOTAL))  # in place: the same tensor has another meaning
    assert not torch.equal(logits_of(model, positions), before)
    assert len(calls) == 2


def logits_of(model, positions):
    with torch.no_grad():
        return model(IDS, position_ids=positions).logits


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention_mask": HOLE}, "one run of ones per row, .* not so in row 0"),
        ({"cu_seq_lens_q": BOUNDS[:-1]}, "ascend from 0 to the length"),
        ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS + 1}, "cu_seq_lens_k be the same"),
        ({"cu_seq_lens_q": BOUNDS[[0, -1]], "position_ids": POSITIONS}, "restart only where"),
        ({"cu_seq_lens_q": BOUNDS[None]}, r"expected \[N \+ 1\] and a batch of 1"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    model = ifx.patch_model(build(), SETTINGS)
    with pytest.raises(ValueError, match=message):
        model(IDS, **kwargs)


def test_rows_share_positions_given_once():
    model = ifx.patch_model(build(), SETTINGS)
    ids = tokens(TOTAL, 2)
    with torch.no_grad():
        ours = model(ids, position_ids=POSITIONS).logits
        for row, our in zip(ids, ours, strict=True):
            assert_close(our[None], alone(model, row[None]))


def test_inference_mode_reads_what_changed_in_place():
    model = ifx.patch_model(build(), SETTINGS)
    with torch.inference_mode():
        positions = POSITIONS.clone()
        packed = model(IDS, position_ids=positions).logits
        positions.copy_(torch.arange(TOTAL))
        whole = model(IDS, position_ids=positions).logits
        assert_close(whole, model(IDS).logits)
        assert not torch.allclose(whole, packed, atol=1e-2)
