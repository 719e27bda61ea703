"""Read documents in chunks from text, .jsonl and .parquet files and saved data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from infllm_flex.training.data.errors import DataError

_CHUNK = 2**20
_LONGEST_LINE = 2**28
_ROWS = 256


class DamagedError(ValueError):
    """A document cannot be read; the message names the file, the place and the reason."""


Chunks = Iterator[str]
"""The text of one document in order. Iterating raises `DamagedError` if it is damaged."""


def is_dataset(folder: Path) -> bool:
    """Whether Hugging Face's ``Dataset.save_to_disk`` wrote the folder."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def read_documents(path: Path, name: str, field: str) -> Iterator[Chunks]:
    """Iterate over the documents of a file or data set; only one chunk of text is in memory.

    A ``.jsonl`` file has one document per line, a ``.parquet`` file or data set one per row. Any
    other file is one document. A document must be consumed or dropped before the next is requested.

    Args:
        path: A file, or the folder of a data set.
        name: Name of the file in messages.
        field: Key or column of the text.

    Raises:
        DataError: The file cannot be read at all.
    """
    return _reader(path)(path, name, field)


def _reader(path: Path) -> Callable[[Path, str, str], Iterator[Chunks]]:
    if path.is_dir():
        return _read_dataset
    return {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix.lower(), _read_text)


def _read_text(path: Path, name: str, field: str) -> Iterator[Chunks]:
    yield _text_chunks(path, name)


def _text_chunks(path: Path, name: str) -> Chunks:
    rest = ""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while chunk := file.read(_CHUNK):
                # Split after a newline, where tokenizers split too. A chunk without a newline is
                # split at its end.
                end_of_line = chunk.rfind("\n") + 1
                if end_of_line:
                    yield rest + chunk[:end_of_line]
                    rest = chunk[end_of_line:]
                else:
                    yield rest
                    rest = chunk
    except UnicodeDecodeError as error:
        raise DamagedError(f"{name}: not UTF-8: {error.reason}") from error
    yield rest


def _read_jsonl(path: Path, name: str, field: str) -> Iterator[Chunks]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            where = f"{name}:{number}"
            if not line.endswith(b"\n") and len(line) == _LONGEST_LINE:
                while (more := file.readline(_LONGEST_LINE)) and not more.endswith(b"\n"):
                    pass
                yield _damaged(f"{where}: the line is longer than {_LONGEST_LINE} bytes")
            elif line.strip():
                yield _json_text(line, where, field)


def _json_text(line: bytes, where: str, field: str) -> Chunks:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DamagedError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if field not in record:
        raise DamagedError(
            f"{where}: no key {field!r} (data.text_field), "
            f"the keys are {', '.join(record) or 'none'}"
        )
    yield _text_of(record[field], where, field)


def _text_of(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DamagedError(f"{where}: expected text under {field!r}, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DamagedError(f"{where}: not Unicode text: {error.reason}") from error
    return value


def _damaged(message: str) -> Chunks:
    raise DamagedError(message)
    yield  # makes this a generator, so that the error is raised when the document is read


def _read_parquet(path: Path, name: str, field: str) -> Iterator[Chunks]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{name}: .parquet files need pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise DataError(
                f"{name}: no column {field!r} (data.text_field), "
                f"the columns are {', '.join(file.schema_arrow.names)}"
            )
        yield from _rows(file.iter_batches(batch_size=_ROWS, columns=[field]), name, field)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a readable .parquet file: {error}") from error


def _read_dataset(path: Path, name: str, field: str) -> Iterator[Chunks]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name}: data sets on disk need datasets: pip install datasets") from error
    try:
        rows = datasets.load_from_disk(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{name}: not a readable data set: {error}") from error
    if field not in rows.column_names:
        raise DataError(
            f"{name}: no column {field!r} (data.text_field), "
            f"the columns are {', '.join(rows.column_names)}"
        )
    tables = rows.select_columns([field]).with_format("arrow")
    yield from _rows(tables.iter(_ROWS), name, field)


def _rows(tables: Iterable[Any], name: str, field: str) -> Iterator[Chunks]:
    """The rows of Arrow tables or record batches, whose only column is the text."""
    values = (value for table in tables for value in table.column(0))
    for number, value in enumerate(values, start=1):
        yield _scalar(value, f"{name}: row {number}", field)


def _scalar(value: Any, where: str, field: str) -> Chunks:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise DamagedError(f"{where}: not UTF-8: {error.reason}") from error
    yield _text_of(text, where, field)
