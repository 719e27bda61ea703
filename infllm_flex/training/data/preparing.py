"""Reading the text once: processes that ask at the same time wait for the first of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from infllm_flex.training.atomic_folder import clear_leftovers, publish
from infllm_flex.training.data.documents import Chunks, read_documents
from infllm_flex.training.data.encoding import Encoding
from infllm_flex.training.data.files import find_files
from infllm_flex.training.data.store import TokenStore, is_published, open_store
from infllm_flex.training.data.writing import check_damage, write_store
from infllm_flex.training.settings import DataSettings

_FORMAT = 1


def open_or_write(settings: DataSettings, folder: Path, encoding: Encoding) -> TokenStore:
    """Find the tokens of the files in a folder of such, or put them there.

    Raises:
        DataError: A file cannot be read, too many documents are damaged, or the tokens are.
    """
    from tqdm import tqdm

    root, names = find_files(settings)
    target = folder / _key(settings, encoding, root, names)
    if is_published(target):
        return open_store(target)
    with _locked(folder):
        if not is_published(target):  # by another process, while this one waited
            clear_leftovers(folder, target.name)

            def write(aside: Path) -> None:
                documents = tqdm(
                    _all_documents(root, names, settings.text_field),
                    desc="reading text",
                    unit=" documents",
                    disable=None,  # on a terminal only
                )
                write_store(aside, documents, encoding, settings.held_out_percent)
                check_damage(aside, settings.damaged_percent)

            publish(target, write)
    return open_store(target)


def _all_documents(root: Path, names: list[str], field: str) -> Iterator[Chunks]:
    for name in names:
        yield from read_documents(root / name, name if name != "." else root.name, field)


def _key(settings: DataSettings, encoding: Encoding, root: Path, names: list[str]) -> str:
    """A name for the tokens of these files: another wherever they could differ."""
    files = []
    for name in names:
        inner = sorted((root / name).rglob("*")) if name == "." else [root / name]
        stats = [(path.name, path.stat()) for path in inner]
        files.append([name, [(inner, stat.st_size, stat.st_mtime_ns) for inner, stat in stats]])
    about = [_FORMAT, files, encoding.fingerprint, settings.held_out_percent, settings.text_field]
    return "tokens-" + hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
