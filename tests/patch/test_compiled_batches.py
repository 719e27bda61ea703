"""Padded and packed batches in one graph."""

import pytest
import torch

import infllm_flex as ifx
from tests.patch.models import (
    CONFIGS,
    LONG,
    SETTINGS,
    build,
    logits,
    tokens,
)
from tests.patch.packed import (
    IDS,
    PACKINGS,
    alone,
    assert_close,
    padded_batch,
    positions_from,
)


@pytest.fixture
def one_layer():
    """A model of one layer, which compiles fast, and the same compiled."""
    torch.compiler.reset()
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    model = ifx.patch_model(build(config), SETTINGS)
    yield model, torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.parametrize("kwargs", PACKINGS.values(), ids=PACKINGS)
def test_packing_compiles_as_one_graph(kwargs, one_layer):
    model, compiled = one_layer
    with torch.no_grad():
        expected = alone(model)
        assert_close(compiled(IDS, **positions_from(kwargs)).logits, expected)


def test_packing_below_dense_len_compiles_as_one_graph(one_layer):
    model, compiled = one_layer
    ifx.patch_model(model, SETTINGS, dense_len=1000)
    with torch.no_grad():
        expected = alone(model)
        for name in ("bounds", "positions without cache"):
            assert_close(compiled(IDS, **positions_from(PACKINGS[name])).logits, expected)
        # A graph cannot read positions. It keeps the fast causal path; an error says what it needs.
        with pytest.raises(RuntimeError, match="pass use_cache=False or cu_seq_lens_q"):
            compiled(IDS, **PACKINGS["positions"])


def test_padding_compiles_as_one_graph(one_layer):
    model, compiled = one_layer
    ids, mask, positions = padded_batch()
    keep = mask.bool()
    ours = compiled(ids, attention_mask=mask, position_ids=positions).logits
    ours[keep].square().sum().backward()
    assert_close(ours[keep], model(ids, attention_mask=mask, position_ids=positions).logits[keep])
    hole = mask.clone()
    hole[0, 100] = 0
    with pytest.raises(RuntimeError, match="attention_mask must hold one run of ones per row"):
        compiled(ids, attention_mask=hole, position_ids=positions)


def test_a_graph_without_room_says_what_to_pass(one_layer):
    model, compiled = one_layer
    with pytest.raises(RuntimeError, match="pass the bounds of the documents as cu_seq_lens_q"):
        compiled(tokens(LONG, 1), position_ids=(torch.arange(LONG) % 2)[None])
    assert_close(
        logits(model, LONG, position_ids=(torch.arange(LONG) % 2)[None]),
        model(tokens(LONG).view(-1, 2)).logits.view(2, LONG, -1),
    )
