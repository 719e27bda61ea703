"""Documents of files, and the messages of damaged ones."""

from __future__ import annotations

import json

import pytest

from infllm_flex.training.data import DataError
from infllm_flex.training.data import documents as module
from infllm_flex.training.data.documents import DamagedError, read_documents


def read(path, field="text"):
    """The texts of all documents, with the error in place of a damaged one."""
    found = []
    for chunks in read_documents(path, path.name, field):
        try:
            found.append("".join(chunks))
        except DamagedError as error:
            found.append(error)
    return found


@pytest.mark.parametrize("text", ["", "one line", "a\nb\n", "é\r\n" * 40, "x" * 99])
def test_a_text_file_is_one_document_for_any_chunk_size(tmp_path, monkeypatch, text):
    monkeypatch.setattr(module, "_CHUNK", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert read(path) == [text]


def test_chunks_of_a_text_file_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 10)
    path = tmp_path / "a.txt"
    path.write_text("word word\n" * 20 + "rest")
    (chunks,) = read_documents(path, "a.txt", "text")
    parts = list(chunks)
    assert len(parts) > 10
    assert all(part.endswith("\n") for part in parts[:-1] if part)


def test_a_text_file_that_is_not_utf_8_is_damaged(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n" * 10 + b"\xff\xfe")
    (error,) = read(path)
    assert str(error).startswith("a.txt: not UTF-8: ")


def test_damaged_lines_are_reported_one_by_one_and_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_LINE", 64)
    lines = [
        json.dumps({"text": "first", "id": 1}),
        "{broken",
        "",
        json.dumps(["text"]),
        json.dumps({"body": "x"}),
        json.dumps({"text": None}),
        json.dumps({"text": "\ud800"}),
        json.dumps({"text": "y" * 200}),
        "[" * 60,
        json.dumps({"text": "last ü"}),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    found = read(path)
    assert found[0] == "first"
    assert found[-1] == "last ü"
    assert [str(error) for error in found[1:-1]] == [
        "a.jsonl:2: not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
        "a.jsonl:4: expected a JSON object, got list",
        "a.jsonl:5: no key 'text' (data.text_field), the keys are body",
        "a.jsonl:6: expected text under 'text', got NoneType",
        "a.jsonl:7: not Unicode text: surrogates not allowed",
        "a.jsonl:8: the line is longer than 64 bytes",
        "a.jsonl:9: not JSON: Expecting value: line 2 column 1 (char 61)",
    ]


def test_a_line_that_is_not_utf_8_is_damaged(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n{"text": "good"}\n')
    error, good = read(path)
    assert str(error).startswith("a.jsonl:1: not JSON: 'utf-8' codec can't decode")
    assert good == "good"


def test_the_case_of_a_suffix_means_nothing(tmp_path):
    path = tmp_path / "lines.JSONL"
    path.write_text('{"text": "first"}\n{"text": "second"}\n')
    assert read(path) == ["first", "second"]


def test_the_field_can_have_another_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x"}\n')
    assert read(path, "content") == ["x"]


def test_a_parquet_file_is_read_row_by_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = [f"row {number}" for number in range(600)]
    parquet.write_table(pyarrow.table({"text": [*texts, None], "id": range(601)}), path)
    *found, error = read(path)
    assert found == texts
    assert str(error) == "a.parquet: row 601: expected text under 'text', got NoneType"
    with pytest.raises(DataError, match=r"no column 'body' .*, the columns are text, id"):
        read(path, "body")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable \.parquet file"):
        read(path)


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_a_parquet_row_that_is_not_utf_8_is_damaged(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = pyarrow.array([b"one", b"tw\xff", b"three"], pyarrow.binary())
    column = values.cast(
        pyarrow.large_string() if kind == "large_string" else pyarrow.string(), safe=False
    )
    if kind == "dictionary":
        column = column.dictionary_encode()
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path)
    one, error, three = read(path)
    assert (one, three) == ("one", "three")
    assert str(error) == "a.parquet: row 2: not UTF-8: invalid start byte"


def test_a_row_of_a_data_set_that_is_not_utf_8_is_damaged(tmp_path):
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array([b"one", b"\xff", b"three"], pyarrow.binary())
    table = pyarrow.table({"text": column.cast(pyarrow.string(), safe=False)})
    datasets.Dataset(table).save_to_disk(tmp_path / "set")
    one, error, three = read(tmp_path / "set")
    assert (one, three) == ("one", "three")
    assert str(error) == "set: row 2: not UTF-8: invalid start byte"


@pytest.mark.parametrize("values", [[7, 8], [["a"], ["b"]], [{"a": 1}, {"a": 2}], [b"x", b"y"]])
def test_parquet_rows_of_another_type_are_damaged(tmp_path, values):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": values}), path)
    name = type(values[0]).__name__
    assert [str(error) for error in read(path)] == [
        f"a.parquet: row {number}: expected text under 'text', got {name}" for number in (1, 2)
    ]


def test_a_data_set_on_disk_is_read_row_by_row(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "set"
    rows = datasets.Dataset.from_dict({"text": ["one", "two", None], "id": [1, 2, 3]})
    rows.save_to_disk(path)
    *found, error = read(path)
    assert found == ["one", "two"]
    assert str(error) == "set: row 3: expected text under 'text', got NoneType"
    with pytest.raises(DataError, match=r"no column 'body' .*, the columns are text, id"):
        read(path, "body")
