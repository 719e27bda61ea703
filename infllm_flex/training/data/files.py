"""Find the files of the ``data`` section."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from infllm_flex.training.data.documents import is_dataset
from infllm_flex.training.data.errors import DataError
from infllm_flex.training.settings import STDLIB, DataSettings

# Installed packages differ between machines; tests and tables are unlike ordinary source code.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings"}


def find_files(settings: DataSettings) -> tuple[Path, list[str]]:
    """Find the text files.

    Returns:
        The folder, and the sorted paths relative to it with forward slashes. A data set saved by
        Hugging Face's ``datasets`` is the single path ``"."``.

    Raises:
        DataError: There are no text files.
    """
    if settings.source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in root.rglob("*.py") if not _NOT_LIBRARY & set(p.relative_to(root).parts)]
        hint = "this Python has no source files; set data.source to a folder of text"
    else:
        root = Path(settings.source).expanduser()
        if root.is_file():
            return root.parent, [root.name]
        if is_dataset(root):
            return root, ["."]
        if (root / "dataset_dict.json").is_file():
            splits = sorted(path.name for path in root.iterdir() if is_dataset(path))
            raise DataError(
                f"data.source: {root} is a data set with splits ({', '.join(splits)}): "
                f"name one, for example {root / splits[0] if splits else root}"
            )
        paths = list(root.rglob(settings.pattern))
        hint = "set data.pattern to match the names of your text files"
    names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
    if not names:
        raise DataError(f"data.source: no text files in {root}: {hint}")
    return root, names
