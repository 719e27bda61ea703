"""Text is split by folder, without copies across the split; a window is from one folder."""

from __future__ import annotations

import pytest
import torch

from evaluation.quality import text
from evaluation.quality.settings import TextSettings
from infllm_flex.training.data.encoding import ModelTokenizer
from tests.evaluation.quality.tiny import make_base, make_texts, words


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def texts_of(documents, tokenizer) -> list[str]:
    return [tokenizer.decode(documents[n].tolist()) for n in range(len(documents))]


def test_folders_are_trained_on_or_held_out_and_copies_are_left_out(tmp_path, base):
    source = make_texts(tmp_path / "texts")
    copied = (source / "part0" / "text.txt").read_text()
    for number in range(30):  # enough copies for one to be held out if copies were kept
        (source / f"copy{number}").mkdir()
        (source / f"copy{number}" / "copy.txt").write_text(copied)
    settings = TextSettings(source=str(source), pattern="*.txt", held_out_percent=20)
    text.prepare(settings, base, tmp_path / "store")
    store = text.open_text(tmp_path / "store")
    assert len(store.train) + len(store.held_out) == 40
    assert 3 <= len(store.held_out) <= 16
    tokenizer = ModelTokenizer(base)._tokenizer
    parts = [texts_of(documents, tokenizer) for documents in (store.train, store.held_out)]
    bodies = [{found.partition("\n")[2] for found in part} for part in parts]
    assert not bodies[0] & bodies[1]
    assert sum(copied in found for part in parts for found in part) == 1


def test_tokens_are_made_once_and_are_those_of_the_files(tmp_path, base):
    source = make_texts(tmp_path / "texts", folders=12)
    settings = TextSettings(source=str(source), pattern="*.txt", held_out_percent=30)
    text.prepare(settings, base, tmp_path / "store")
    first = text.open_text(tmp_path / "store")
    (source / "part0" / "text.txt").unlink()
    text.prepare(settings, base, tmp_path / "store")
    assert text.open_text(tmp_path / "store").identity == first.identity


def test_a_file_that_two_roots_reach_comes_once(tmp_path, monkeypatch):
    source = make_texts(tmp_path / "outer", folders=4)
    monkeypatch.setattr(text, "_roots", lambda settings: [source / "part1", source])
    found = text.find_folders(TextSettings(pattern="*.txt"))
    assert len([file for folder in found for file in folder.files]) == 4


def test_windows_are_of_one_folder_each_and_are_cut_round_robin(tmp_path, base):
    source = make_texts(tmp_path / "texts", folders=10)
    settings = TextSettings(source=str(source), pattern="*.txt", held_out_percent=50)
    text.prepare(settings, base, tmp_path / "store")
    documents = text.open_text(tmp_path / "store").held_out
    cut = text.windows(documents, 200, len(documents) + 2)
    assert cut.shape == (len(documents) + 2, 201)
    for number in range(len(documents)):
        assert torch.equal(cut[number], documents[number][:201].long())
    with pytest.raises(text.TextError, match="no held-out folder has 100001 tokens"):
        text.windows(documents, 100_000, 3)


def test_a_part_without_text_says_so(tmp_path, base):
    folder = tmp_path / "texts" / "only"
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(" ".join(words() * 3))
    settings = TextSettings(source=str(tmp_path / "texts"), pattern="*.txt")
    with pytest.raises(text.TextError, match="leave nothing"):
        text.prepare(settings, base, tmp_path / "store")
    assert not (tmp_path / "store").exists()
