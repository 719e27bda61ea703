"""Dense by position, a patched model gives a token what its prefix alone would give it."""

import copy

import pytest
import torch

import infllm_flex as ifx
from tests.patch.generation import in_parts
from tests.patch.models import FULL_ATTENTION, SETTINGS, build, tokens
from tests.patch.packed import (
    IDS,
    LENGTHS,
    PACKINGS,
    alone,
    assert_close,
    padded_batch,
    positions_from,
)
from tests.patch.plain_models import STYLES, CachedHeads, plain_model

BY_POSITION = {**SETTINGS, "dense_by": "position"}  # 80 tokens of budget, dense up to 95
SIZES = [(1,), (95, 1, 44), (60, 70, 10)]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_whole_prompt_equals_chunks_and_single_tokens(sizes, kind):
    model, ids = ifx.patch_model(build(), BY_POSITION), tokens(140)
    whole = logits(model, ids)
    sizes = list(sizes) * (140 // sum(sizes))
    with torch.no_grad():
        assert_close(in_parts(model, ids, None, sizes, kind), whole)
        by_sequence = ifx.patch_model(model, SETTINGS)
        parts = in_parts(by_sequence, ids, None, sizes, kind)
    assert_close(parts, whole)  # chunks go by position with either
    assert (logits(by_sequence, ids) - whole).abs().max() > 1e-2


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_whatever_the_family_later_tokens_change_nothing(family):
    model, ids = ifx.patch_model(build(family), BY_POSITION), tokens(140)
    whole = logits(model, ids)
    for end in (94, 95, 96, 110):
        assert_close(logits(model, ids[:, :end]), whole[:, :end])


@pytest.mark.parametrize("packing", PACKINGS)
def test_each_packed_document_switches_at_its_own_position(packing):
    model = ifx.patch_model(build(), BY_POSITION)
    with torch.no_grad():
        ours = model(IDS, **positions_from(PACKINGS[packing])).logits
        assert_close(ours, alone(model))
        parts = [in_parts(model, ids, None, 50) for ids in IDS.split(list(LENGTHS), 1)]
    assert_close(ours, torch.cat(parts, 1))


def test_each_padded_row_switches_at_its_own_position():
    model = ifx.patch_model(build(), BY_POSITION)
    ids, mask, positions = padded_batch()
    ours = logits(model, ids, attention_mask=mask, position_ids=positions)
    for row, keep in enumerate(mask[:3].bool()):
        own = ids[row : row + 1, keep]
        with torch.no_grad():
            assert_close(ours[row : row + 1, keep], in_parts(model, own, None, 70))


def test_gradients_are_those_of_the_chunks_together():
    model, ids = ifx.patch_model(build(), BY_POSITION), tokens(140)

    def gradients(run):
        model.zero_grad()
        run().square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients(lambda: model(ids).logits)
    parts = gradients(lambda: in_parts(model, ids, None, [70, 50, 20]))
    for ours, theirs in zip(whole, parts, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_it_trains_in_one_graph():
    model, ids = ifx.patch_model(build(), BY_POSITION).train(), tokens(140)
    expected = model(ids, labels=ids).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    loss = compiled(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(compiled.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("style", STYLES)
def test_in_a_model_that_calls_sdpa_itself(style):
    model, ids = ifx.patch_model(plain_model(style), BY_POSITION), tokens(140)
    with torch.no_grad():
        whole = model(ids)
        for end in (95, 96, 110):
            assert_close(model(ids[:, :end]), whole[:, :end])


def test_in_a_model_with_a_cache_of_its_own():
    model, ids = ifx.patch_model(plain_model(CachedHeads), BY_POSITION), tokens(140)
    with torch.no_grad():
        whole = model(ids, torch.arange(140))
        parts = [model(ids[:, at], at) for at in torch.arange(140).split([60, 70, 10])]
    assert_close(torch.cat(parts, 1), whole)


def test_the_rule_shows_in_the_table_and_in_the_log(caplog):
    with caplog.at_level("INFO", "infllm_flex"):
        model = ifx.patch_model(build(), BY_POSITION)
    rows = ifx.describe(model)
    assert {row.status for row in rows} == {
        "sparse from 96 tokens on, query by query: 5 blocks of 16"
    }
    assert "2 of 2 attention layers sparse from 96 tokens on, query by query (" in caplog.text
