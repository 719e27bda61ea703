"""Make the token store of the text once, under a lock, or open the existing one."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from infllm_flex.training.atomic_folder import publish, remove_leftovers
from infllm_flex.training.data.documents import Chunks, read_documents
from infllm_flex.training.data.encoding import Encoding
from infllm_flex.training.data.files import find_files
from infllm_flex.training.data.store import TokenStore, is_published, open_store
from infllm_flex.training.data.writing import check_damage, write_store
from infllm_flex.training.settings import DataSettings

_FORMAT = 1


def open_or_write(settings: DataSettings, folder: Path, encoding: Encoding) -> TokenStore:
    """Open the token store of the files, or write it first.

    Args:
        settings: The ``data`` section.
        folder: The folder of the token stores.
        encoding: The encoding of the text.

    Raises:
        DataError: A file cannot be read, too many documents are damaged, or the store is damaged.
    """
    root, names = find_files(settings)
    target = folder / _key(settings, encoding, root, names)
    if not is_published(target):
        _write_once(target, root, names, settings, encoding)
    store = open_store(target)
    # Another run may have written the store, with another limit.
    check_damage(target, settings.damaged_percent)
    return store


def _write_once(
    target: Path, root: Path, names: list[str], settings: DataSettings, encoding: Encoding
) -> None:
    """Write a token store, unless another process does it meanwhile."""
    from tqdm import tqdm

    folder = target.parent
    with _locked(folder):
        if not is_published(target):
            remove_leftovers(folder, target.name)

            def write(temporary: Path) -> None:
                documents = tqdm(
                    _all_documents(root, names, settings.text_field),
                    desc="reading text",
                    unit=" documents",
                    disable=None,  # shows the bar on a terminal only
                )
                write_store(temporary, documents, encoding, settings.held_out_percent)
                check_damage(temporary, settings.damaged_percent)

            publish(target, write)


def _all_documents(root: Path, names: list[str], field: str) -> Iterator[Chunks]:
    for name in names:
        yield from read_documents(root / name, name if name != "." else root.name, field)


def _key(settings: DataSettings, encoding: Encoding, root: Path, names: list[str]) -> str:
    """The name of the store, which changes with everything that can change its tokens."""
    files = []
    for name in names:
        inner = sorted((root / name).rglob("*")) if name == "." else [root / name]
        stats = [(path.name, path.stat()) for path in inner]
        files.append([name, [(part, stat.st_size, stat.st_mtime_ns) for part, stat in stats]])
    about = [_FORMAT, files, encoding.fingerprint, settings.held_out_percent, settings.text_field]
    return "tokens-" + hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
