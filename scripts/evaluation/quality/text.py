"""The text of a comparison: files, split by folder into train and held out, and their tokens."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.quality.settings import PYTHON, TextSettings
from infllm_flex.training.atomic_folder import publish, remove_leftovers
from infllm_flex.training.data.encoding import ModelTokenizer
from infllm_flex.training.data.store import ABOUT, Documents, TokenStore, open_store

_SHORTEST, _LONGEST = 800, 400_000  # characters of a file
_AT_ONCE = 2**22  # characters to encode per call, enough for all threads of the tokenizer


class TextError(ValueError):
    """The text is missing or too short."""


class SourceFolder(NamedTuple):
    """A folder of text: its path relative to the root of the search, and its files."""

    name: str
    files: list[Path]


def find_folders(settings: TextSettings) -> list[SourceFolder]:
    """Find the folders that contain text files, in the order of a hash of their names.

    Raises:
        TextError: There are none.
    """
    found: dict[str, SourceFolder] = {}
    seen: set[Path] = set()
    for root in _roots(settings):
        for path in sorted(root.rglob(settings.pattern)):
            real = path.resolve()  # one root may be inside another
            if real in seen or not real.is_file():
                continue
            seen.add(real)
            if _SHORTEST <= real.stat().st_size <= 4 * _LONGEST:
                name = path.parent.relative_to(root).as_posix()
                found.setdefault(name, SourceFolder(name, [])).files.append(path)
    if not found:
        raise TextError(
            f"text.source: no file {settings.pattern} of {_SHORTEST} characters or more in "
            f"{settings.source}: name a folder of text, and text.pattern"
        )
    return [found[name] for name in sorted(found, key=_hash)]


def prepare(settings: TextSettings, model: Path, folder: Path) -> None:
    """Read the files and write their tokens as a store in ``folder``, unless it exists.

    Raises:
        TextError: The train or the held-out part is empty.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent, folder.name)
    encoding = ModelTokenizer(model)
    publish(folder, lambda aside: _write(aside, settings, encoding))


def open_text(folder: Path) -> TokenStore:
    """Map the tokens into memory."""
    return open_store(folder, checksums=False)


def windows(documents: Documents, length: int, count: int) -> Tensor:
    """Cut windows of text, round-robin over the documents that are long enough.

    Args:
        documents: Documents; each is the text of a folder.
        length: Tokens of the model's input; a window has one more, the last label.
        count: Largest number of windows.

    Returns:
        int64 ``[N, length + 1]``.

    Raises:
        TextError: No document is long enough.
    """
    size = length + 1
    cut: list[Tensor] = []
    round_number = 0
    while len(cut) < count:
        end = (round_number + 1) * size
        longer = [n for n in range(len(documents)) if _length(documents, n) >= end]
        if not longer:
            break
        cut += [documents[n][end - size : end] for n in longer]
        round_number += 1
    if not cut:
        raise TextError(
            f"text: no held-out folder has {size} tokens: give more text, or a smaller judge.length"
        )
    return torch.stack(cut[:count]).long()


def _length(documents: Documents, number: int) -> int:
    return int(documents.starts[number + 1] - documents.starts[number])


def _roots(settings: TextSettings) -> list[Path]:
    if settings.source != PYTHON:
        return [Path(settings.source).expanduser()]
    paths = sysconfig.get_paths()
    roots = [Path(paths["purelib"]), Path(paths["stdlib"])]
    # A virtual environment may take large packages from the interpreter that it was made from.
    roots += [Path(entry) for entry in sys.path if entry.endswith(("site-packages", "packages"))]
    found: dict[Path, None] = {}
    for root in roots:
        if root.is_dir():
            found[root.resolve()] = None
    return list(found)


def _write(folder: Path, settings: TextSettings, encoding: ModelTokenizer) -> None:
    parts = {"train": _Part(), "held_out": _Part()}
    known: set[bytes] = set()
    waiting: list[tuple[_Part, list[str]]] = []
    read, size = 0, 0
    for source in find_folders(settings):
        held_out = _hash(source.name) % 100 < settings.held_out_percent
        texts = list(_texts(source.files, known))
        waiting.append((parts["held_out" if held_out else "train"], texts))
        characters = sum(map(len, texts))
        read, size = read + characters, size + characters
        if size >= _AT_ONCE:
            _encode(waiting, encoding)
            waiting, size = [], 0
        if read >= settings.characters:
            break
    _encode(waiting, encoding)
    for name, part in parts.items():
        if len(part.starts) < 2:
            raise TextError(
                f"text: {settings.held_out_percent} % of the folders of {settings.source} leave "
                f"nothing {'to train on' if name == 'train' else 'held out'}: give more folders, "
                "or another text.held_out_percent"
            )
        (folder / f"{name}_tokens.bin").write_bytes(b"".join(part.tokens))
        (folder / f"{name}_starts.bin").write_bytes(part.starts.tobytes())
    about = {"dtype": "int32", "vocabulary": encoding.vocabulary, "damaged": 0, "examples": []}
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


class _Part:
    """Tokens of the train or the held-out part; a folder is one document."""

    def __init__(self) -> None:
        self.tokens: list[bytes] = []
        self.starts = array("q", [0])

    def add(self, texts: Sequence[bytes], token_size: int) -> None:
        self.tokens += texts
        size = sum(map(len, texts)) // token_size
        if size:
            self.starts.append(self.starts[-1] + size)


def _encode(waiting: list[tuple[_Part, list[str]]], encoding: ModelTokenizer) -> None:
    """Encode the waiting folders in one call."""
    encoded = iter(encoding.encode([text for _, texts in waiting for text in texts]))
    for part, texts in waiting:
        part.add([next(encoded) for _ in texts], encoding.dtype.itemsize)


def _texts(files: Iterable[Path], known: set[bytes]) -> Iterator[str]:
    """Yield the text of each file that is not a copy of a ``known`` one; packages have copies."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few source files have other encodings
        digest = hashlib.sha256(text.encode()).digest()
        if _SHORTEST <= len(text) <= _LONGEST and digest not in known:
            known.add(digest)
            yield f"# {path.parent.name}/{path.name}\n{text}\n"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
