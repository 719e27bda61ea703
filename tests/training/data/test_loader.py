"""The same samples in the same order for any number of ranks and workers."""

from __future__ import annotations

import signal

import pytest
import torch

from infllm_flex.training.data import Batch, PackedSampler, batches
from infllm_flex.training.data.batch import document_boundaries
from tests.training.data.test_sampler import documents, equal

# Python 3.12 warns about PyTorch's threads when workers are forked.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture
def sampler():
    lengths = torch.randint(2, 60, (400,), generator=torch.Generator().manual_seed(4)).tolist()
    return PackedSampler(documents(lengths), 32, seed=0, name="a")


def merged(parts):
    names = ("input_ids", "labels", "position_ids")
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def test_batches_are_the_samples_in_order(sampler):
    found = list(batches(sampler, 4, first=0, last=5))
    assert len(found) == 5
    assert equal(merged(found), sampler.batch(range(20)))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_split_a_step_without_gap_or_overlap(sampler, ranks):
    alone = list(batches(sampler, 4, 0, 3))
    shared = [list(batches(sampler, 4, 0, 3, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for step in range(3):
        assert equal(merged([parts[step] for parts in shared]), alone[step])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(sampler, workers):
    alone = list(batches(sampler, 4, 0, 9))
    helped = list(batches(sampler, 4, 0, 9, workers=workers))
    assert all(equal(one, other) for one, other in zip(alone, helped, strict=True))


def test_a_run_resumes_at_any_step_with_other_workers_and_ranks(sampler):
    alone = list(batches(sampler, 4, 0, 8))
    for first, ranks, workers in ((3, 1, 0), (5, 2, 0), (7, 4, 1)):
        parts = [
            list(batches(sampler, 4, first, 8, rank=rank, ranks=ranks, workers=workers))
            for rank in range(ranks)
        ]
        for step in range(first, 8):
            assert equal(merged([part[step - first] for part in parts]), alone[step])


def test_the_loader_draws_no_random_number(sampler):
    before = torch.get_rng_state()
    next(batches(sampler, 2, 0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_ignore_stop_signals(sampler):
    class Interrupted:
        def batch(self, indices):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            return sampler.batch(indices)

    assert len(list(batches(Interrupted(), 2, 0, 2, workers=1))) == 2


def test_a_batch_size_that_ranks_do_not_divide_is_refused(sampler):
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 ranks"):
        batches(sampler, 4, 0, 1, ranks=3)


def test_a_single_row_has_the_document_boundaries_of_flash_attention(sampler):
    inputs = sampler.batch([0]).model_inputs()
    positions = inputs["position_ids"][0]
    boundaries = inputs["cu_seq_lens_q"]
    assert boundaries.dtype == torch.int32
    assert inputs["cu_seq_lens_k"] is boundaries
    assert inputs["max_length_q"] == inputs["max_length_k"] == 32
    starts = (positions == 0).nonzero().flatten().tolist()
    assert boundaries.tolist() == starts + [32] * (len(boundaries) - len(starts))
    assert "cu_seq_lens_q" not in sampler.batch([0, 1]).model_inputs()


@pytest.mark.parametrize(("count", "size"), [(1, 17), (16, 17), (17, 33), (33, 49)])
def test_boundaries_come_in_few_shapes(count, size):
    positions = torch.cat([torch.arange(2) for _ in range(count)])
    boundaries = document_boundaries(positions)
    assert len(boundaries) == size
    assert boundaries[count:].unique().tolist() == [2 * count]


def test_a_batch_moves_as_a_whole(sampler):
    batch = sampler.batch([0, 1]).to(torch.device("meta"))
    assert {t.device.type for t in (batch.input_ids, batch.labels, batch.position_ids)} == {"meta"}
    assert sampler.batch([0]).num_labels == int((sampler.batch([0]).labels >= 0).sum())
