"""Text is read once, in spite of interruptions, and is the same for every process."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig

from infllm_flex.training.data import (
    DataError,
    check_vocabulary,
    open_text,
    preparing,
    writing,
)
from infllm_flex.training.settings import DataSettings
from tests.training.runs import write_lines


def settings(source, **changes):
    values = {"packing": "documents", "pattern": "*.jsonl", "held_out_percent": 0}
    return DataSettings(source=str(source), **(values | changes))


def texts_of(documents):
    return [bytes(documents[number].tolist()).decode() for number in range(len(documents))]


@pytest.fixture
def lines(tmp_path):
    return write_lines(tmp_path / "lines.jsonl", [f"text number {i} " * i for i in range(1, 40)])


def test_all_documents_are_stored_in_order(lines, tmp_path):
    store = open_text(settings(lines), tmp_path / "data").store
    assert texts_of(store.train) == [f"text number {i} " * i for i in range(1, 40)]
    assert len(store.held_out) == 0
    assert store.vocabulary == 256


def test_a_long_text_is_one_document_for_any_chunk_size(tmp_path, monkeypatch):
    text = "".join(f"line {i}\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    monkeypatch.setattr("infllm_flex.training.data.documents._CHUNK", 50)
    monkeypatch.setattr(writing, "_ENCODED_CHARACTERS", 200)
    store = open_text(settings(tmp_path, pattern="*.txt"), tmp_path / "data").store
    assert texts_of(store.train) == [text, "short"]


def test_blank_texts_and_single_bytes_are_left_out_without_a_warning(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", "  \n", "x", "xy"])
    store = open_text(settings(path), tmp_path / "data").store
    assert texts_of(store.train) == ["xy"]
    assert store.damaged == 0


def test_the_text_of_a_document_alone_decides_whether_it_is_held_out(tmp_path):
    texts = [f"text {i}" for i in range(200)]
    few = open_text(
        settings(write_lines(tmp_path / "few.jsonl", texts[:100]), held_out_percent=30),
        tmp_path / "data",
    ).store
    many = open_text(
        settings(write_lines(tmp_path / "many.jsonl", texts[::-1] * 2), held_out_percent=30),
        tmp_path / "data",
    ).store
    assert set(texts_of(few.held_out)) <= set(texts_of(many.held_out))
    assert set(texts_of(many.train)).isdisjoint(texts_of(many.held_out))
    assert 30 < len(set(texts_of(many.held_out))) < 90


def test_text_is_read_once_and_again_when_it_changes(lines, tmp_path, monkeypatch):
    first = open_text(settings(lines), tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "write_store", lambda *_: pytest.fail("read again"))
        assert open_text(settings(lines), tmp_path / "data").identity == first.identity
    write_lines(lines, ["something else"])
    assert open_text(settings(lines), tmp_path / "data").identity != first.identity


def test_the_same_text_elsewhere_has_the_same_identity(lines, tmp_path):
    other = tmp_path / "copy.jsonl"
    other.write_bytes(lines.read_bytes())
    os.utime(other, (1, 1))
    one = open_text(settings(lines), tmp_path / "data")
    assert open_text(settings(other), tmp_path / "elsewhere").identity == one.identity


def test_concurrent_processes_read_the_text_once(lines, tmp_path, monkeypatch):
    calls, real = [], preparing.write_store
    monkeypatch.setattr(preparing, "write_store", lambda *args: (calls.append(1), real(*args))[1])
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_text(settings(lines), tmp_path / "data"), range(4)))
    assert len(calls) == 1
    assert len({text.identity for text in opened}) == 1


def test_an_interrupted_read_leaves_no_store(lines, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writing._Pipeline, "flush", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_text(settings(lines), tmp_path / "data")
    (tmp_path / "data" / f".tmp-tokens-{'0' * 16}-{'0' * 32}").mkdir()
    store = open_text(settings(lines), tmp_path / "data").store
    assert len(store.train) == 39


def test_damage_below_the_limit_is_a_warning_and_above_it_an_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [f"text {i}" for i in range(98)])
    path.write_text(path.read_text() + "broken\n{}\n")
    with pytest.raises(
        DataError,
        match=r"2 of 100 documents are damaged, more than data.damaged_percent = 1: a.jsonl:99: ",
    ):
        open_text(settings(path), tmp_path / "data")
    assert not list((tmp_path / "data").glob("*tokens*"))
    for _ in range(2):  # when it is written, and when it is opened
        with pytest.warns(UserWarning, match=r"left out 2 damaged .*: a\.jsonl:99: not JSON"):
            text = open_text(settings(path, damaged_percent=2.0), tmp_path / "data")
    assert len(text.store.train) == 98


def test_the_limit_of_damage_holds_for_the_store_of_another_run(tmp_path):
    path = write_lines(tmp_path / "lines.jsonl", [f"text {n}" for n in range(9)])
    path.write_text(path.read_text() + "damaged\n")
    with pytest.warns(UserWarning, match="left out 1 damaged documents"):
        open_text(settings(path, damaged_percent=10.0), tmp_path / "stores")
    with pytest.raises(DataError, match=r"1 of 10 documents are damaged, more than .* = 5"):
        open_text(settings(path, damaged_percent=5.0), tmp_path / "stores")


def test_a_long_damaged_document_leaves_no_tokens(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("good " * 30)
    (tmp_path / "b.txt").write_bytes(b"line\n" * 100 + b"\xff")
    (tmp_path / "c.txt").write_text("fine " * 30)
    monkeypatch.setattr("infllm_flex.training.data.documents._CHUNK", 20)
    monkeypatch.setattr(writing, "_ENCODED_CHARACTERS", 60)
    with pytest.warns(UserWarning, match=r"1 damaged documents: b\.txt: not UTF-8"):
        text = open_text(
            settings(tmp_path, pattern="*.txt", damaged_percent=50.0), tmp_path / "data"
        )
    assert texts_of(text.store.train) == ["good " * 30, "fine " * 30]


def test_a_flipped_bit_in_the_tokens_is_detected(lines, tmp_path):
    open_text(settings(lines), tmp_path / "data")
    (folder,) = (tmp_path / "data").glob("tokens-*")
    rng = random.Random(0)
    for path in [p for p in folder.iterdir() if p.stat().st_size]:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"is damaged .*: delete it and start again"):
            open_text(settings(lines), tmp_path / "data")
        path.write_bytes(whole)


def test_reading_takes_a_few_megabytes_for_any_amount_of_text(tmp_path):
    words = "".join(f"{number} " for number in range(2000))
    path = write_lines(tmp_path / "a.jsonl", [words] * 3000)
    size = path.stat().st_size
    tracemalloc.start()
    try:
        text = open_text(settings(path), tmp_path / "data")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(text.store.train.tokens) > 0.99 * (size - 20 * 3000)
    assert size > 26e6
    assert peak < 13e6


def test_text_without_training_documents_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(DataError, match="no document of at least two tokens"):
        open_text(settings(path), tmp_path / "data")


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a tokenizer of whole words that marks begin and end of a text."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "<s>", "</s>", "one", "two", "three"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_a_models_tokenizer_marks_begin_and_end_of_each_document(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ["one two", "three four", ""])
    store = open_text(settings(path, tokenizer=str(tokenizer)), tmp_path / "data").store
    assert [store.train[i].tolist() for i in range(2)] == [[1, 3, 4, 2], [1, 5, 0, 2]]
    assert len(store.train) == 2
    assert store.vocabulary == 6
    assert store.train.tokens.dtype == torch.int32


def test_tokenizer_model_is_the_models_own(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ["one two"])
    by_name = open_text(settings(path, tokenizer="model"), tmp_path / "a", model=tokenizer)
    by_path = open_text(settings(path, tokenizer=str(tokenizer)), tmp_path / "b")
    assert by_name.identity == by_path.identity
    with pytest.raises(DataError, match=r"model\.tiny has no tokenizer"):
        open_text(settings(path, tokenizer="model"), tmp_path / "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.tokenizer: no tokenizer in .*empty"):
        open_text(settings(path, tokenizer=str(tmp_path / "empty")), tmp_path / "c")


def test_a_folder_without_a_tokenizer_is_refused_with_the_setting_to_change(tmp_path, lines):
    LlamaConfig().save_pretrained(tmp_path / "model")
    documents = settings(lines, tokenizer="model")
    with pytest.raises(
        DataError, match=r"no tokenizer in .*[^:]; set data\.tokenizer to bytes"
    ) as e:
        open_text(documents, tmp_path / "stores", tmp_path / "model")
    assert len(str(e.value).splitlines()) == 1


def test_a_stream_and_its_identity_follow_from_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    stream = DataSettings(source=str(tmp_path), held_out_percent=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = open_text(stream, tmp_path / "data").identity
    (tmp_path / "a.txt").write_text("some Text")
    assert open_text(stream, tmp_path / "data").identity != first
    assert not (tmp_path / "data").exists()


def test_the_description_of_a_store_is_readable_json(lines, tmp_path):
    open_text(settings(lines), tmp_path / "data")
    (folder,) = (tmp_path / "data").glob("tokens-*")
    about = json.loads((folder / "about.json").read_text())
    assert (about["documents"], about["damaged"], about["dtype"]) == (39, 0, "uint8")


def test_a_data_set_with_splits_is_refused_with_their_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_dict({"text": ["one", "two"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"is a data set with splits \(test, train\): name one"):
        open_text(settings(tmp_path / "set"), tmp_path / "data")
    text = open_text(settings(tmp_path / "set" / "train"), tmp_path / "data")
    assert texts_of(text.store.train) == ["one", "two"]


def test_tokens_beyond_the_vocabulary_are_refused_and_bytes_are_a_warning(tmp_path):
    text = open_text(DataSettings(source=str(write_text(tmp_path))), tmp_path / "data")
    check_vocabulary(text, 256)
    with pytest.raises(ValueError, match=r"it has 256 tokens, the model has 255: set"):
        check_vocabulary(text, 255)
    with pytest.warns(UserWarning, match="bytes are not the 32000 tokens"):
        check_vocabulary(text, 32000)


def write_text(folder):
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"text {number}")
    return folder
