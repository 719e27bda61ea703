"""Chunks over a cache of padded rows: each row turns sparse at the same token as alone."""

import pytest
import torch
import torch.nn.functional as F

import infllm_flex as ifx
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex.patch.sdpa_calls import SdpaCall, attend
from tests.inputs import make_qkv
from tests.patch.generation import in_parts, new_cache
from tests.patch.models import CACHE, FULL_ATTENTION, SETTINGS, build, tokens

TURNING = {**SETTINGS, "dense_len": 97, "topk": 3}
WIDE = {"block_size": 32, "window_size": 32}
PADS = (16, 0, 41, 3, 88)


def padded(length, pads=PADS):
    ids = tokens(length, batch=len(pads))
    mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask


def assert_rows_are_as_alone(model, ids, mask, sizes, ours):
    """Each row alone, in the same chunks without its padding, or token by token."""
    for row, pad in enumerate((mask == 0).sum(1).tolist()):
        ends = torch.tensor(sizes).cumsum(0) - pad
        alone = [int(x) for x in ends.clamp(min=0).diff(prepend=torch.zeros(1)) if x > 0]
        own = ids[row : row + 1, pad:]
        for split in (alone, [alone[0], *[1] * (own.shape[1] - alone[0])]):
            expected = in_parts(model, own, None, split)
            torch.testing.assert_close(ours[row, pad:], expected[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sizes", [(80, 17), (90, 60), (79, 33, 17, 21), (91, 16, 40)], ids=str)
def test_a_padded_row_turns_sparse_at_its_own_token(sizes, kind):
    model = ifx.patch_model(build(), TURNING)
    ids, mask = padded(sum(sizes))
    with torch.no_grad():
        ours = in_parts(model, ids, mask, list(sizes), kind)
        assert_rows_are_as_alone(model, ids, mask, list(sizes), ours)


@pytest.mark.parametrize("engine", ["fused", "flex"])
@pytest.mark.parametrize("changes", [{}, {"window_size": 0}, {"lse": "exact"}, WIDE])
def test_whatever_the_settings(changes, engine):
    if engine == "flex" and changes:
        pytest.skip("compiles for each")
    model = ifx.patch_model(build(), TURNING, **changes, engine=engine)
    ids, mask = padded(150)
    with torch.no_grad():
        ours = in_parts(model, ids, mask, [90, 60])
        assert_rows_are_as_alone(model, ids, mask, [90, 60], ours)


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_whatever_the_family(family):
    model = ifx.patch_model(build(family), TURNING)
    ids, mask = padded(140, pads=(30, 0))
    with torch.no_grad():
        ours = in_parts(model, ids, mask, [85, 55])
        assert_rows_are_as_alone(model, ids, mask, [85, 55], ours)


def test_with_gradients():
    model = ifx.patch_model(build(), TURNING)
    ids, mask = padded(140, pads=(30, 0, 7))
    with torch.no_grad():
        cache = new_cache(model, "dynamic")
        model(ids[:, :85], attention_mask=mask[:, :85], **{CACHE: cache})
    ours = model(ids[:, 85:], attention_mask=mask, **{CACHE: cache}).logits
    ours.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, pad in enumerate((30, 0, 7)):
        with torch.no_grad():
            cache = new_cache(model, "dynamic")
            model(ids[row : row + 1, pad:85], **{CACHE: cache})
        theirs = model(ids[row : row + 1, 85:], **{CACHE: cache}).logits
        torch.testing.assert_close(ours[row : row + 1], theirs, rtol=1e-3, atol=1e-4)
        theirs.square().sum().backward()
    for mine, other in zip(gradients, model.parameters(), strict=True):
        assert (mine - other.grad).norm() < 1e-3 * other.grad.norm()


def test_in_a_compiled_graph_over_a_static_cache():
    model = ifx.patch_model(build(), TURNING)
    ids, mask = padded(145, pads=(16, 0, 60))
    cache, eager = new_cache(model, "static"), new_cache(model, "static")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for which in (cache, eager):
            model(ids[:, :85], attention_mask=mask[:, :85], **{CACHE: which})
        ours, theirs = (
            run(ids[:, 85:], attention_mask=mask, **{CACHE: which}).logits
            for run, which in ((compiled, cache), (model, eager))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        first = in_parts(model, ids[:, :85], mask[:, :85], [85])
        assert_rows_are_as_alone(model, ids, mask, [85, 60], torch.cat([first, ours], 1))


def test_a_prompt_in_chunks_generates_what_it_generates_alone():
    model = ifx.patch_model(build(), TURNING)
    ids, mask = padded(120, pads=(35, 0, 80))
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 30}
    together = model.generate(ids, attention_mask=mask, prefill_chunk_size=40, **options)
    for row, pad in enumerate((35, 0, 80)):
        alone = ids[row : row + 1, pad:]
        # The first chunk is as short as in the batch, because it decides which tokens are dense.
        with torch.no_grad():
            cache = new_cache(model, "dynamic")
            for part in alone[:, :-1].split(max(1, 40 - pad), 1):
                model(part, **{CACHE: cache})
        expected = model.generate(
            alone, attention_mask=torch.ones_like(alone), **{CACHE: cache}, **options
        )
        assert torch.equal(together[row, pad:], expected[0])


def test_models_with_a_cache_of_their_own_turn_sparse_query_by_query():
    """Through F.scaled_dot_product_attention, with a mask."""
    layer = PatchedLayer(ifx.InfLLMConfig.from_dict(TURNING))
    query, key, value = make_qkv(130, Sq=50)
    mask = torch.ones(50, 130, dtype=torch.bool).tril(80)
    ours = attend(layer, SdpaCall(query, key, value, mask, enable_gqa=True))
    for i in range(50):
        until = 81 + i
        own = query[:, :, i : i + 1], key[:, :, :until], value[:, :, :until]
        alone = attend(layer, SdpaCall(*own, enable_gqa=True))
        if alone is None:  # dense: SDPA answers
            alone = F.scaled_dot_product_attention(*own, enable_gqa=True)
        torch.testing.assert_close(ours[:, :, i : i + 1], alone, rtol=1e-4, atol=1e-5)
