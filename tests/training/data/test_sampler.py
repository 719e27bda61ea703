"""The samples of a step are a function of its number; an epoch has every token once."""

from __future__ import annotations

import pytest
import torch

from infllm_flex.training.data import NO_LABEL, DataError, PackedSampler, WindowSampler
from infllm_flex.training.data.store import Documents


def documents(lengths, dtype=torch.int32):
    """Documents whose tokens are numbered from 0."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return Documents(torch.arange(int(starts[-1]), dtype=dtype), starts)


def equal(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("input_ids", "labels", "position_ids")
    )


def test_an_epoch_visits_every_window_once_and_the_next_differs():
    sampler = WindowSampler(torch.arange(1000), 10, seed=1, name="a")
    first, second = sampler.batch(range(99)).input_ids, sampler.batch(range(99, 198)).input_ids
    for epoch in (first, second):
        starts = epoch[:, 0].sort().values
        assert 0 <= starts[0] < 10
        assert (starts.diff() == 10).all()
    assert not torch.equal(first, second)


def test_a_window_depends_on_its_index_alone():
    stream = torch.randint(256, (5000,), dtype=torch.uint8)
    straight = WindowSampler(stream, 16, seed=3, name="a").batch(range(1000)).input_ids
    sampler = WindowSampler(stream, 16, seed=3, name="a")
    jumps = [999, 0, 311, 312, 700, 5]
    assert torch.equal(sampler.batch(jumps).input_ids, straight[jumps])
    for seed, name in ((4, "a"), (3, "b")):
        other = WindowSampler(stream, 16, seed=seed, name=name).batch(range(9)).input_ids
        assert not torch.equal(other, straight[:9])


@pytest.mark.parametrize("length", [20, 21, 33, 40])
def test_no_window_reaches_beyond_the_text(length):
    stream = torch.arange(80, dtype=torch.uint8)
    batch = WindowSampler(stream, length, seed=0, name="a").batch(range(60))
    assert batch.input_ids.shape == (60, length)
    assert (batch.input_ids.diff(dim=1) == 1).all()
    assert (batch.labels == batch.input_ids + 1).all()
    assert batch.position_ids is None


def test_too_little_text_is_refused_with_the_number_of_bytes_needed():
    with pytest.raises(DataError, match=r"19 bytes of training .* at least 20 bytes are needed"):
        WindowSampler(torch.zeros(19), 10, seed=0, name="a")


def test_documents_are_separate_and_no_label_crosses_their_boundary():
    lengths = torch.randint(2, 90, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    text = documents(lengths)
    owner = torch.repeat_interleave(torch.arange(300), torch.tensor(lengths))
    batch = PackedSampler(text, 64, seed=0, name="a").batch(range(100))
    for ids, labels, positions in zip(
        batch.input_ids, batch.labels, batch.position_ids, strict=True
    ):
        begins = (positions == 0).nonzero().flatten().tolist()
        assert begins[0] == 0
        for begin, end in zip(begins, [*begins[1:], 64], strict=True):
            piece, last = ids[begin:end], int(ids[end - 1])
            assert torch.equal(positions[begin:end], torch.arange(end - begin))
            if not piece.any() and (labels[begin:end] == NO_LABEL).all():
                assert end == 64  # padding, and the first token of all text is never alone
                continue
            assert (piece.diff() == 1).all()
            assert (owner[piece] == owner[piece[0]]).all()
            assert torch.equal(labels[begin : end - 1], piece[1:])
            ends = last + 1 == len(owner) or owner[last + 1] != owner[last]
            assert labels[end - 1] == (NO_LABEL if ends else last + 1)


@pytest.mark.parametrize("buckets", [(), (20, 40)])
def test_an_epoch_predicts_every_token_once(buckets):
    lengths = torch.randint(2, 200, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    text = documents(lengths)
    sampler = PackedSampler(text, 64, seed=0, name="a", buckets=buckets)
    batch = sampler.batch(range(len(text.tokens) // 64 * 4))
    predicted = batch.labels[batch.labels != NO_LABEL]
    firsts = set(text.starts.tolist())
    expected = [token for token in range(len(text.tokens)) if token not in firsts]
    counts = torch.bincount(predicted.long(), minlength=len(text.tokens))
    assert not counts[text.starts[:-1]].any()
    if not buckets:
        # Four epochs of rows, a few with padding: each token occurs three or four times.
        assert set(counts[expected].tolist()) <= {3, 4, 5}
    assert (counts[expected] > 0).all()


@pytest.mark.parametrize("buckets", [(), (512, 1024, 2048)])
def test_at_most_three_percent_is_padding_and_few_documents_are_split(buckets):
    generator = torch.Generator().manual_seed(2)
    lengths = torch.empty(20_000).log_normal_(5.5, 1.2, generator=generator)
    text = documents(lengths.long().clamp(2, 4096).tolist())
    sampler = PackedSampler(text, 4096, seed=0, name="a", buckets=buckets)
    batch = sampler.batch(range(512))
    filled = (batch.labels != NO_LABEL).sum() + (batch.position_ids == 0).sum()
    assert filled / batch.labels.numel() > 0.97
    cut = (batch.position_ids == 0).sum() - sum(
        int((row[positions == 0].unsqueeze(1) == text.starts).any(1).sum())
        for row, positions in zip(batch.input_ids, batch.position_ids, strict=True)
    )
    assert cut < 0.02 * (batch.position_ids == 0).sum()


def test_length_classes_contribute_equal_numbers_of_tokens():
    generator = torch.Generator().manual_seed(3)
    # Nine tenths of the documents are short, a twentieth is long.
    lengths = torch.cat(
        [
            torch.randint(2, 41, (900,), generator=generator),
            torch.randint(41, 121, (50,), generator=generator),
            torch.randint(121, 321, (50,), generator=generator),
        ]
    )
    text = documents(lengths.tolist())
    batch = PackedSampler(text, 320, seed=0, name="a", buckets=(40, 120)).batch(range(600))
    owner = torch.repeat_interleave(torch.arange(1000), lengths)
    padding = (batch.labels == NO_LABEL) & (batch.input_ids == 0)
    length_of = lengths[owner[batch.input_ids]][~padding]
    shares = [
        ((length_of > low) & (length_of <= high)).float().mean().item()
        for low, high in ((0, 40), (40, 120), (120, 320))
    ]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01)


def test_a_class_without_documents_is_refused_by_its_lengths():
    with pytest.raises(DataError, match=r"none of the 3 documents has 9 to 16 tokens: change"):
        PackedSampler(documents([4, 5, 30]), 32, seed=0, name="a", buckets=(8, 16))


@pytest.mark.parametrize("buckets", [(), (16,)])
def test_a_packed_sample_depends_on_its_index_alone(buckets):
    lengths = torch.randint(2, 60, (400,), generator=torch.Generator().manual_seed(4)).tolist()
    text = documents(lengths)

    def sampler(seed=3, name="a"):
        return PackedSampler(text, 32, seed, name, buckets)

    straight = sampler().batch(range(700))
    for jumps in ([699], [3, 500, 64, 65, 0], [130, 129]):
        batch = sampler().batch(jumps)
        assert torch.equal(batch.input_ids, straight.input_ids[jumps])
        assert torch.equal(batch.labels, straight.labels[jumps])
        assert torch.equal(batch.position_ids, straight.position_ids[jumps])
    assert not equal(sampler(seed=4).batch(range(9)), sampler().batch(range(9)))
    assert not equal(sampler(name="b").batch(range(9)), sampler().batch(range(9)))


def test_a_few_short_documents_are_enough():
    batch = PackedSampler(documents([2, 3]), 64, seed=0, name="a").batch(range(3))
    assert set(batch.labels.unique().tolist()) == {NO_LABEL, 1, 3, 4}
