"""The split into training and held-out files."""

from __future__ import annotations

import shutil

import pytest

from infllm_flex.training.data import DataError, held_out_windows, load_corpus
from infllm_flex.training.settings import DataSettings
from tests.training.runs import write_texts


def names(files):
    return {file.name for file in files}


def test_no_file_is_in_both_parts(texts):
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


def test_a_file_stays_in_its_part_when_others_are_added(tmp_path):
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


def test_a_folder_without_text_is_refused_with_the_setting_to_change(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no text files in .*: set data\.pattern"):
        load_corpus(DataSettings(source=str(tmp_path)))


@pytest.mark.parametrize("name", ["a.jsonl", "b.PARQUET", "dataset_info.json"])
def test_a_stream_of_files_that_are_not_plain_text_is_refused(tmp_path, name):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "state.json").write_text("{}")  # with dataset_info.json: a data set
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"data\.source: .* plain text: set data\.packing to doc"):
        load_corpus(DataSettings(source=str(tmp_path), pattern="*"))


def test_held_out_windows_lie_within_one_file_and_do_not_overlap(texts):
    corpus = load_corpus(DataSettings(source=str(texts), held_out_percent=20))
    windows = held_out_windows(corpus.held_out, 99, 1000)
    contents = [bytes(window.tolist()) for window in windows]
    assert len(set(contents)) == len(contents) == 4 * len(corpus.held_out)
    assert all(any(content in f.content for f in corpus.held_out) for content in contents)
    assert len(held_out_windows(corpus.held_out, 99, 3)) == 3
    with pytest.raises(DataError, match="no held-out file has 5001 bytes"):
        held_out_windows(corpus.held_out, 5000, 1)
