"""What is trained on and what is held out, and which bytes each step sees."""

from __future__ import annotations

import shutil

import pytest
import torch

from infllm_flex.training.data import DataError, Sampler, held_out_windows, load_corpus
from infllm_flex.training.settings import DataSettings
from tests.training.runs import write_texts


def names(files):
    return {file.name for file in files}


def test_no_file_is_both_trained_on_and_held_out(texts):
    corpus = load_corpus(DataSettings(source=str(texts), held_out_percent=20))
    assert names(corpus.train).isdisjoint(names(corpus.held_out))
    assert len(names(corpus.train) | names(corpus.held_out)) == 30
    stream = bytes(corpus.train_stream().tolist())
    assert all(file.content in stream for file in corpus.train)
    assert not any(file.content in stream for file in corpus.held_out)


def test_the_standard_library_is_split_by_file():
    corpus = load_corpus(DataSettings())
    assert names(corpus.train).isdisjoint(names(corpus.held_out))
    assert 0.05 < len(corpus.held_out) / len(corpus.train) < 0.2
    assert sum(len(file.content) for file in corpus.train) > 1_000_000
    assert all(name.endswith(".py") for name in names(corpus.train))
    assert not any("site-packages" in name for name in names(corpus.train))


def test_a_file_stays_on_its_side_when_others_are_added(tmp_path):
    few = load_corpus(DataSettings(source=str(write_texts(tmp_path, 20))))
    many = load_corpus(DataSettings(source=str(write_texts(tmp_path, 40))))
    assert names(few.train) <= names(many.train)
    assert names(few.held_out) <= names(many.held_out)


def test_a_copy_of_a_training_file_is_not_held_out(tmp_path):
    write_texts(tmp_path, 30)
    corpus = load_corpus(DataSettings(source=str(tmp_path), held_out_percent=50))
    trained, held_out = corpus.train[0], corpus.held_out[0]
    shutil.copy(tmp_path / trained.name, tmp_path / held_out.name)
    again = load_corpus(DataSettings(source=str(tmp_path), held_out_percent=50))
    assert trained.name in names(again.train)
    assert held_out.name not in names(again.train) | names(again.held_out)


def test_one_text_file_is_enough_to_train_on(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("word " * 100)
    corpus = load_corpus(DataSettings(source=str(path), held_out_percent=0))
    assert names(corpus.train) == {"book.txt"}
    assert corpus.held_out == ()
    with pytest.raises(DataError, match=r"held_out_percent: 10 % of the 1 files .* is none"):
        load_corpus(DataSettings(source=str(path)))


def test_a_folder_without_text_is_refused_with_what_to_set(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no text files in .*: set data\.pattern"):
        load_corpus(DataSettings(source=str(tmp_path)))


def test_an_epoch_visits_every_window_once_and_the_next_differs():
    sampler = Sampler(torch.arange(1000), 10, seed=1, name="a")
    first, second = sampler.batch(range(99)), sampler.batch(range(99, 198))
    for epoch in (first, second):
        starts = epoch[:, 0].sort().values
        assert 0 <= starts[0] < 10
        assert (starts.diff() == 10).all()
    assert not torch.equal(first, second)


def test_a_sample_depends_on_its_index_alone():
    stream = torch.randint(256, (5000,), dtype=torch.uint8)
    straight = Sampler(stream, 16, seed=3, name="a").batch(range(1000))
    sampler = Sampler(stream, 16, seed=3, name="a")
    jumps = [999, 0, 311, 312, 700, 5]
    assert torch.equal(sampler.batch(jumps), straight[jumps])
    assert not torch.equal(Sampler(stream, 16, seed=4, name="a").batch(range(9)), straight[:9])
    assert not torch.equal(Sampler(stream, 16, seed=3, name="b").batch(range(9)), straight[:9])


@pytest.mark.parametrize("length", [20, 21, 33, 40])
def test_no_sample_reaches_beyond_the_text(length):
    stream = torch.arange(80, dtype=torch.uint8)
    batch = Sampler(stream, length, seed=0, name="a").batch(range(60))
    assert batch.shape == (60, length + 1)
    assert (batch.diff(dim=1) == 1).all()


def test_too_little_text_is_said_with_how_much_is_needed():
    with pytest.raises(DataError, match=r"19 bytes of training text .* at least 20 are needed"):
        Sampler(torch.zeros(19), 10, seed=0, name="a")


def test_held_out_windows_lie_within_one_file_and_do_not_overlap(texts):
    corpus = load_corpus(DataSettings(source=str(texts), held_out_percent=20))
    windows = held_out_windows(corpus.held_out, 99, 1000)
    contents = [bytes(window.tolist()) for window in windows]
    assert len(set(contents)) == len(contents) == 4 * len(corpus.held_out)
    assert all(any(content in f.content for f in corpus.held_out) for content in contents)
    assert len(held_out_windows(corpus.held_out, 99, 3)) == 3
    with pytest.raises(DataError, match="no held-out file has 5001 bytes"):
        held_out_windows(corpus.held_out, 5000, 1)
