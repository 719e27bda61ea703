"""The selection loss equals its float64 definition, and trains what it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import infllm_flex as ifx
from infllm_flex import reference_loss
from infllm_flex.training.data import NO_LABEL, Batch
from infllm_flex.training.selection_loss.divergence import selection_loss
from infllm_flex.training.selection_loss.sampled_queries import SampledQueries, draw_positions
from tests.inputs import make_qkv

WINDOWS = ifx.InfLLMConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=2, init_blocks=1
)
CONFIGS = {
    "windows": WINDOWS,
    "exact": replace(WINDOWS, lse="exact"),
    "long windows": replace(WINDOWS, kernel_size=32, kernel_stride=16, init_blocks=0),
    "no window": replace(WINDOWS, init_blocks=0, window_size=0),
    "every key": replace(WINDOWS, kernel_size=1, kernel_stride=1, pool_queries=True),
    "slowest dims": replace(
        WINDOWS, kernel_size=1, kernel_stride=1, pool_queries=True, score_dims=4
    ),
    "pairs": replace(WINDOWS, kernel_size=2, kernel_stride=2, pool_queries=True),
    "float8": replace(
        WINDOWS, kernel_size=1, kernel_stride=1, pool_queries=True, score_dtype="float8"
    ),
}
CPU = torch.device("cpu")


def whole(length, batch=None):
    batch = batch or Batch(torch.zeros(1, length), torch.zeros(1, length))
    return SampledQueries.of_batch(torch.arange(length), batch, WINDOWS, CPU)


def inputs(S=150, B=2, Hq=4, Hkv=2, D=8):
    query, key, _ = make_qkv(B=B, Hq=Hq, Hkv=Hkv, S=S, D=D)
    return query * 2, key * 2


def gradients_of_definition(query, key, config, **documents):
    leaves = [x.double().requires_grad_() for x in (query, key)]
    loss = reference_loss.selection_loss(*leaves, config, **documents)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def assert_equals_definition(found, expected):
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients_equal_the_definition(config):
    query, key = inputs()
    loss, *gradients = gradients_of_definition(query, key, config)
    found = selection_loss(query, key, whole(150), config, 8**-0.5)
    assert loss.sum() > 0.5
    assert_equals_definition(found, (loss.sum(), *gradients))


def test_chunks_change_no_more_than_rounding():
    query, key = inputs()
    at_once, one_by_one = (
        selection_loss(query, key, whole(150), WINDOWS, 0.3, chunk_products=n) for n in (2**24, 1)
    )
    for ours, theirs in zip(one_by_one, at_once, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["windows", "every key", "long windows"])
def test_packed_documents_are_as_if_alone_and_padding_trains_nothing(name):
    config, (query, key) = CONFIGS[name], inputs(S=220, B=2)
    starts = [(0, 5, 100, 190), (0, 70, 220, 220)]  # the last document of the first row is padding
    positions, labels = torch.zeros(2, 220, dtype=torch.int64), torch.zeros(2, 220)
    for row, bounds in enumerate(starts):
        for first, end in zip(bounds, (*bounds[1:], 220), strict=True):
            positions[row, first:end] = torch.arange(end - first)
    labels[0, 190:] = NO_LABEL
    batch = Batch(torch.zeros(2, 220), labels, positions)
    queries = SampledQueries.of_batch(torch.arange(220), batch, config, CPU)
    found = selection_loss(query, key, queries, config, 8**-0.5)
    expected = []
    for row, bounds in enumerate(starts):
        end = 190 if row == 0 else 220
        q, k = query[row, None, :, :end], key[row, None, :, :end]
        cu_seqlens = torch.tensor([*(b for b in bounds if b < end), end])
        expected.append(gradients_of_definition(q, k, config, cu_seqlens=cu_seqlens))
        for ours, exact in zip((found.query[row], found.key[row]), expected[-1][1:], strict=True):
            torch.testing.assert_close(ours[:, :end].double(), exact[0], rtol=2e-4, atol=2e-5)
            assert ours[:, end:].abs().sum() == 0
    total = sum(loss.sum() for loss, *_ in expected)
    torch.testing.assert_close(found.loss.double(), total, rtol=1e-5, atol=0.0)


def test_the_loss_is_zero_exactly_where_the_scores_are_the_sums_of_blocks():
    """With one head and windows of whole blocks of equal keys, the scores are those sums."""
    config = replace(WINDOWS, kernel_size=16, kernel_stride=16, window_size=0, lse="exact")
    query, key = inputs(S=128, B=1, Hq=1, Hkv=1)
    key = key[:, :, ::16].repeat_interleave(16, 2)
    exact = reference_loss.selection_loss(query, key, config)
    assert exact.abs().max() < 1e-12
    found = selection_loss(query, key, whole(128), config, 8**-0.5)
    assert found.loss.abs() < 1e-4
    assert found.query.abs().max() < 1e-4
    key[:, :, 40] += 1.0
    assert reference_loss.selection_loss(query, key, config)[0, 0, 80:].max() > 0.01


def test_forced_blocks_and_later_keys_have_no_part_in_it():
    query, key = inputs(S=160, B=1)
    exact, *_ = gradients_of_definition(query, key, WINDOWS)
    # Blocks of 16, the first and the previous one forced: two to choose between from token 64 on,
    # three from token 80 on. An exponent can bring two scores to any two shares in the same order.
    assert exact[:, :, :64].abs().sum() == 0
    assert (exact[:, :, 64:80] > -1e-15).all()
    assert (exact[:, :, 80:] > 1e-12).all()
    changed = key.clone()
    changed[:, :, 120:] += 5
    again, *_ = gradients_of_definition(query, changed, WINDOWS)
    assert torch.equal(again[:, :, :120], exact[:, :, :120])
    found = selection_loss(query, key, whole(160), WINDOWS, 8**-0.5)
    assert found.query[:, :, :64].abs().sum() == 0
    assert torch.isfinite(found.key).all()


def test_the_gradient_flows_through_the_scores_alone():
    """Against finite differences of the scores, with the dense attention held."""
    config, (query, key) = CONFIGS["every key"], inputs(S=80, B=1, Hq=2, Hkv=1)
    _, gradient, _ = gradients_of_definition(query, key, config)
    # Dense attention sees the difference of the two heads' queries; pooled scores see their mean.
    torch.testing.assert_close(gradient[:, 0], gradient[:, 1])


def test_descending_makes_the_scores_agree_with_dense_attention():
    query, key = inputs(S=128, B=1)
    query, key = query.requires_grad_(), key.requires_grad_()
    losses = []
    for _ in range(60):
        found = selection_loss(query, key, whole(128), WINDOWS, 8**-0.5)
        losses.append(float(found.loss))
        with torch.no_grad():
            query -= 0.1 * found.query
            key -= 0.1 * found.key
    assert losses[-1] < 0.5 * losses[0]


def test_short_rows_and_frozen_scores_give_zeros():
    query, key = inputs(S=7, B=1)
    found = selection_loss(query, key, whole(7), WINDOWS, 1.0)
    assert all(x.abs().sum() == 0 for x in found)


def test_positions_are_drawn_one_from_each_part():
    found = draw_positions(1000, 64, seed=3)
    bounds = torch.arange(65) * 1000 // 64
    assert ((bounds[:-1] <= found) & (found < bounds[1:])).all()
    assert torch.equal(found, draw_positions(1000, 64, seed=3))
    assert not torch.equal(found, draw_positions(1000, 64, seed=4))
    assert torch.equal(draw_positions(9, 9, seed=0), torch.arange(9))


def test_a_common_factor_of_the_log_scores_is_no_fault():
    """Up to the number of keys in a window, which a mean of them divides a key's logit by."""
    config = replace(WINDOWS, kernel_size=16, kernel_stride=16, window_size=0, lse="exact")
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    blocks = [0, 1, 2, 3]
    keys = weights.log()[:, None].repeat_interleave(16, 0)  # the attention to block n is weights[n]
    for exponent, least in ((1.0, 0.0), (0.2, 0.0), (1 / 32, 1e-4)):
        scores = exponent * weights.log()
        found = reference_loss.query_loss(torch.ones(1, 1), keys, scores, blocks, config)
        assert (found > least) if least else (found.abs() < 1e-12)
