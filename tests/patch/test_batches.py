"""Padded and packed batches: a sequence gives what it gives alone, in every way to say so."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

import infllm_flex as ifx
from infllm_flex.patch.huggingface import documents
from tests.patch.models import (
    CONFIGS,
    FULL_ATTENTION,
    LONG,
    SETTINGS,
    build,
    enable_checkpointing,
    logits,
    tokens,
)

LENGTHS = (40, 1, 130, 109)  # two below dense_len, two beyond
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
TOTAL = sum(LENGTHS)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
IDS = tokens(TOTAL, 1)

PACKINGS = {
    "bounds": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS.clone()},
    "bounds and positions": {"cu_seq_lens_q": BOUNDS, "position_ids": POSITIONS},
    "positions": {"position_ids": POSITIONS},
    "positions without cache": {"position_ids": POSITIONS, "use_cache": False},
    "positions behind a mask": {"position_ids": POSITIONS, "attention_mask": torch.ones_like(IDS)},
}


def alone(model, ids=IDS, lengths=LENGTHS):
    """Logits of every document by itself, one after the other."""
    return torch.cat([model(part).logits for part in ids.split(list(lengths), 1)], 1)


def positions_from(kwargs):
    """Bounds alone leave the rotary embedding to the caller."""
    return {"position_ids": POSITIONS, **kwargs}


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
def test_while_it_waits_for_positions_it_attends_to_one_sequence(grad, monkeypatch):
    """On a GPU; here the wait is made up. Without gradients, and not after a wrong guess."""
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
    for in_vain in (not grad, 0):
        packed, num_calls = run(position_ids=POSITIONS.clone())
        assert num_calls == num_layers + in_vain
        assert_close(packed, expected)


def test_layers_left_as_they_were_isolate_documents():
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


def padded_batch(sides=("left", "right", "both")):
    """Rows of 140, 60 and 99 tokens, then one of padding: ids, mask and positions."""
    S = 160
    mask = torch.zeros(len(sides) + 1, S, dtype=torch.int64)
    starts = {"left": S - 140, "right": 0, "both": 30}
    for row, side, length in zip(mask, sides, (140, 60, 99), strict=False):
        row[starts[side] : starts[side] + length] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return tokens(S, len(mask)), mask, positions


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_padded_rows_give_what_they_give_alone(family):
    model = ifx.patch_model(build(family), SETTINGS)
    ids, mask, positions = padded_batch()
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, keep, ours in zip(ids, mask.bool(), batch, strict=True):
            if keep.any():
                assert_close(ours[keep], model(row[keep][None]).logits[0])


def test_padded_training_gives_the_sum_of_the_rows_gradients():
    model = ifx.patch_model(build(), SETTINGS).train()
    ids, mask, positions = padded_batch()
    keep = mask.bool()

    def gradients(loss):
        model.zero_grad()
        loss().backward()
        return [p.grad.clone() for p in model.parameters()]

    packed = gradients(
        lambda: model(ids, attention_mask=mask, position_ids=positions).logits[keep].square().sum()
    )
    alone = gradients(
        lambda: sum(
            model(x[k][None]).logits.square().sum() for x, k in zip(ids[:3], keep, strict=False)
        )
    )
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_no_table_of_all_pairs_is_made(monkeypatch):
    import transformers.masking_utils

    def refuse(**arguments):
        raise AssertionError("a mask was spelled out")

    model = ifx.patch_model(build(), SETTINGS)
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", refuse)
    ids, mask, positions = padded_batch()
    model(ids, attention_mask=mask, position_ids=positions)
    model(IDS, position_ids=POSITIONS, use_cache=False)


def test_the_batch_is_read_once_for_all_layers(monkeypatch):
    from infllm_flex.patch.huggingface import documents

    read, calls = documents._read, []
    monkeypatch.setattr(documents, "_read", lambda *args: calls.append(args) or read(*args))
    model = ifx.patch_model(build(), SETTINGS)
    positions = POSITIONS.clone()
    before = logits_of(model, positions)
    assert len(calls) == 1
    positions.copy_(torch.arange(TOTAL))  # in place: the same tensor says something else
    assert not torch.equal(logits_of(model, positions), before)
    assert len(calls) == 2


def logits_of(model, positions):
    with torch.no_grad():
        return model(IDS, position_ids=positions).logits


@pytest.fixture
def one_layer():
    """A model of one layer, as compiling takes long, and the same compiled."""
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
        # A graph that cannot read positions keeps the fast causal path, and says what it needs.
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


HOLE = torch.ones_like(IDS)
HOLE[0, 50:60] = 0


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


def test_padding_between_documents_is_served_where_positions_restart():
    model = ifx.patch_model(build(), SETTINGS)
    positions = torch.arange(TOTAL)[None].clone()
    positions[0, 60:] -= 60
    with torch.no_grad():
        ours = model(IDS, attention_mask=HOLE, position_ids=positions).logits
        assert_close(ours[:, :50], model(IDS[:, :50]).logits)
        assert_close(ours[:, 60:], model(IDS[:, 60:]).logits)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_hole_in_the_mask_is_served_as_before_below_dense_len(implementation):
    model = build(attn_implementation=implementation)
    plain = model(IDS, attention_mask=HOLE).logits
    ifx.patch_model(model, SETTINGS, dense_len=1000)
    assert torch.equal(model(IDS, attention_mask=HOLE).logits, plain)


def test_a_mask_moves_and_is_cut_like_a_tensor():
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    from infllm_flex.patch.huggingface.masks import LazyMask

    _, mask, _ = padded_batch()
    arguments = {"batch_size": 4, "q_length": 160, "kv_length": 160, "attention_mask": mask.bool()}
    lazy = LazyMask({**arguments, "mask_function": causal_mask_function}, is_plain=True)
    spelled = sdpa_mask(**arguments)
    assert torch.equal(lazy[:, :, :9], spelled[:, :, :9])
    assert lazy.shape == tuple(spelled.shape)
    moved = lazy.to("meta", non_blocking=True)
    assert moved.padding.device == moved.materialize().device == torch.device("meta")
    assert lazy.to(torch.float16).padding is lazy.padding


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
