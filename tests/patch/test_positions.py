"""Documents by positions: only a restart begins one, and every forward reads its positions anew."""

import threading

import pytest
import torch

import infllm_flex as ifx
from infllm_flex.patch.huggingface import documents
from tests.patch.models import CONFIGS, SETTINGS, build, enable_checkpointing, equal, tokens

S = 150

ALL_BLOCKS = {**SETTINGS, "topk": 16}

SPANS = torch.cat([torch.arange(70), torch.arange(400, 430), torch.arange(190, 240) + 300])

NOT_PACKED = {
    "jumps": SPANS,
    "repeats": torch.arange(S) // 2,
    "an image that shares a position": torch.arange(S).clamp(max=60)
    + (torch.arange(S) - 110).clamp(min=0),
    "steps of three": torch.arange(0, 3 * S, 3),
    "a late start": torch.arange(S) + 17,
}

WAYS = {
    "cache": {},
    "mask of ones": {"attention_mask": torch.ones(2, S, dtype=torch.long)},
    "no cache": {"use_cache": False},
}

LENGTHS = (35, 104, 1, 99, 22)

DOCUMENTS = torch.cat([torch.arange(n) for n in LENGTHS])[None]

IDS = tokens(sum(LENGTHS), 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NOT_PACKED)
def test_below_dense_len_what_is_not_packed_gives_the_bits_of_the_unpatched_model(name, way):
    positions, model, ids = NOT_PACKED[name][None], build(), tokens(S)
    with torch.no_grad():
        plain = model(ids, position_ids=positions, **WAYS[way]).logits
        ifx.patch_model(model, SETTINGS, dense_len=S + 1)
        assert torch.equal(model(ids, position_ids=positions, **WAYS[way]).logits, plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NOT_PACKED)
def test_at_sparse_length_what_is_not_packed_is_one_sequence(name, way):
    positions, model, ids = NOT_PACKED[name][None], build(), tokens(S)
    with torch.no_grad():
        plain = model(ids, position_ids=positions).logits  # with a cache: not taken for packed
        ifx.patch_model(model, ALL_BLOCKS)
        assert_close(model(ids, position_ids=positions, **WAYS[way]).logits, plain)


@pytest.mark.parametrize("dense_len", [SETTINGS["dense_len"], S + 1])
def test_a_document_may_begin_at_any_position_that_goes_back(dense_len):
    model = ifx.patch_model(build(), SETTINGS, dense_len=dense_len)
    first, second = torch.arange(20, 60), torch.cat([torch.arange(7, 57), torch.arange(80, 140)])
    positions, ids = torch.cat([first, second])[None], tokens(S, 1)
    with torch.no_grad():
        ours = model(ids, position_ids=positions).logits
        assert_close(ours[:, :40], model(ids[:, :40], position_ids=first[None]).logits)
        assert_close(ours[:, 40:], model(ids[:, 40:], position_ids=second[None]).logits)


def test_jumps_compile_as_one_sequence():
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    model, ids = build(config), tokens(S)
    torch.compiler.reset()
    with torch.no_grad():
        positions = NOT_PACKED["jumps"][None]
        plain = model(ids, position_ids=positions).logits
        ifx.patch_model(model, ALL_BLOCKS)
        for dense_len in (S + 1, SETTINGS["dense_len"]):
            ifx.patch_model(model, ALL_BLOCKS, dense_len=dense_len)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert_close(compiled(ids, position_ids=positions).logits, plain)
    torch.compiler.reset()


def change_by_numpy(positions, new):
    positions.numpy()[...] = new.numpy()


def change_data(positions, new):
    positions.data.copy_(new)


@pytest.mark.parametrize("change", [change_by_numpy, change_data])
@pytest.mark.parametrize("keyword", ["position_ids", "cu_seq_lens_q"])
def test_what_a_batch_says_is_read_anew_in_every_forward(change, keyword):
    models = [ifx.patch_model(build(), SETTINGS, dense_len=n) for n in (96, 1000)]
    if keyword == "position_ids":
        given, new = DOCUMENTS.clone(), torch.arange(IDS.shape[1])[None]
    else:
        given = torch.tensor([0, 100, IDS.shape[1]], dtype=torch.int32)
        new = torch.tensor([0, 30, IDS.shape[1]], dtype=torch.int32)
    with torch.no_grad():
        for model in models:
            model(IDS, **{keyword: given})
        version = given._version
        change(given, new)
        assert given._version == version, "this change must be one that no counter shows"
        for model in models:
            expected = model(IDS, **{keyword: new.clone()}).logits
            assert torch.equal(model(IDS, **{keyword: given}).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_recomputes_the_batch_of_its_own_forward(use_reentrant, monkeypatch):
    read, calls = documents._read, []
    monkeypatch.setattr(documents, "_read", lambda *args: calls.append(1) or read(*args))
    model = ifx.patch_model(build(), SETTINGS).train()
    positions = DOCUMENTS.clone()

    def gradients():
        model.zero_grad()
        packed = model(IDS, position_ids=positions, use_cache=False).logits
        positions.numpy()[...] = torch.arange(IDS.shape[1]).numpy()
        whole = model(IDS, position_ids=positions, use_cache=False).logits
        (packed.square().sum() + whole.square().sum()).backward()
        positions.copy_(DOCUMENTS)
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    assert len(calls) == 2, "once for each forward"
    enable_checkpointing(model, use_reentrant)
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4, "recomputing reads nothing"


def test_a_model_that_makes_its_own_positions_reads_nothing(monkeypatch):
    monkeypatch.setattr(documents, "read_flag", None)
    model = ifx.patch_model(build(), SETTINGS)
    enable_checkpointing(model.train())
    model(IDS, use_cache=False).logits.sum().backward()
    model(IDS[:, :50], use_cache=False).logits.sum().backward()


def test_positions_that_another_hook_brings_are_read():
    model = ifx.patch_model(build(), SETTINGS)
    with torch.no_grad():
        expected = model(IDS, position_ids=DOCUMENTS).logits
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "position_ids": DOCUMENTS}),
            with_kwargs=True,
        )
        assert torch.equal(model(IDS).logits, expected)


def test_a_layer_called_by_itself_reads_its_own_call():
    model = ifx.patch_model(build(), SETTINGS, dense_len=1000)
    layer, positions = model.model.layers[0].self_attn, DOCUMENTS.clone()
    hidden = torch.randn(1, IDS.shape[1], 64)

    def attend(positions):
        turns = model.model.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
        return layer(hidden, turns, None, position_ids=positions)[0]

    with torch.no_grad():
        model(IDS, position_ids=positions)
        packed = attend(positions)
        positions.numpy()[...] = torch.arange(IDS.shape[1]).numpy()
        assert torch.equal(attend(positions), attend(positions.clone()))
        assert not torch.allclose(attend(positions), packed, atol=1e-3)


def test_a_model_that_only_names_the_implementation_reads_each_batch_once(monkeypatch):
    read, calls = documents._read, []
    monkeypatch.setattr(documents, "_read", lambda *args: calls.append(1) or read(*args))
    config = CONFIGS["llama"]()
    config.sparse_config = SETTINGS
    named, patched = build(config, attn_implementation="infllm_flex"), build(config)
    ifx.patch_model(patched)
    given, whole = DOCUMENTS.clone(), torch.arange(IDS.shape[1])[None]
    with torch.no_grad():
        for new in (DOCUMENTS, whole, DOCUMENTS):
            given.numpy()[...] = new.numpy()
            calls.clear()
            ours = named(IDS, position_ids=given).logits
            assert len(calls) == 1
            assert torch.equal(ours, patched(IDS, position_ids=new.clone()).logits)


def test_threads_read_their_own_batches():
    model = ifx.patch_model(build(), SETTINGS)
    batches = [DOCUMENTS, torch.arange(IDS.shape[1])[None]]
    with torch.no_grad():
        expected = [model(IDS, position_ids=x).logits for x in batches]
    wrong = []

    def run(positions, logits):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(model(IDS, position_ids=positions).logits, logits):
                    wrong.append(positions)

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(batches, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_ends_its_forward():
    from infllm_flex.patch.running_forward import current_forward

    model = ifx.patch_model(build(), SETTINGS)
    with pytest.raises(ValueError, match="ascend from 0 to the length"):
        model(IDS, cu_seq_lens_q=torch.tensor([0, 5, 9]))
    assert current_forward() is None


def test_unpatching_leaves_no_hook():
    model = build()
    ifx.unpatch_model(ifx.patch_model(ifx.patch_model(model, SETTINGS), SETTINGS))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)


def test_gradients_below_dense_len_are_those_of_the_unpatched_model():
    model, ids = build().train(), tokens(S)
    positions = NOT_PACKED["repeats"][None]

    def gradients():
        model.zero_grad()
        model(ids, position_ids=positions).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    ifx.patch_model(model, SETTINGS, dense_len=S + 1)
    assert equal(gradients(), plain)
