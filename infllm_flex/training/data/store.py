"""Documents as tokens in two flat files per part, mapped into memory: only what is read is loaded.

``<part>_tokens.bin`` holds all tokens behind one another, ``<part>_starts.bin`` where each document
begins, as int64, and the end.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infllm_flex.training.data.errors import DataError
from infllm_flex.training.manifest import MANIFEST, BrokenFolderError, read_manifest, verify

ABOUT = "about.json"
PARTS = ("train", "held_out")
_DTYPES = {"uint8": torch.uint8, "int32": torch.int32}


@dataclass(frozen=True)
class Documents:
    """Tokens of documents.

    Attributes:
        tokens: ``[N]``, uint8 or int32, of all documents.
        starts: int64 ``[D + 1]``, where in ``tokens`` each begins, and N.
    """

    tokens: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Tensor:
        """The tokens of one document, a view."""
        return self.tokens[int(self.starts[number]) : int(self.starts[number + 1])]


@dataclass(frozen=True)
class TokenStore:
    """The text of a run.

    Attributes:
        train: What is trained on.
        held_out: What never is.
        vocabulary: Token numbers are below this.
        damaged: Documents left out because they could not be read.
        examples: What was wrong with the first of them.
        identity: Equal exactly for equal tokens, on any machine.
    """

    train: Documents
    held_out: Documents
    vocabulary: int
    damaged: int
    examples: tuple[str, ...]
    identity: str


def open_store(folder: Path, checksums: bool = True) -> TokenStore:
    """Map a published store into memory.

    Args:
        folder: Of the store.
        checksums: Whether to read all of it once to compare it with its manifest.

    Raises:
        DataError: It is damaged.
    """
    try:
        verify(folder, checksums)
        files = read_manifest(folder)
        about = json.loads((folder / ABOUT).read_text())
        dtype = _DTYPES[about["dtype"]]
        train, held_out = (_open_part(folder, name, dtype) for name in PARTS)
    except (BrokenFolderError, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{folder} is damaged ({error}): delete it, and the text is read again"
        ) from error
    text = json.dumps([about["dtype"], *(files[f"{name}_tokens.bin"] for name in PARTS)])
    starts = json.dumps([files[f"{name}_starts.bin"] for name in PARTS])
    return TokenStore(
        train=train,
        held_out=held_out,
        vocabulary=about["vocabulary"],
        damaged=about["damaged"],
        examples=tuple(about["examples"]),
        identity=hashlib.sha256((text + starts).encode()).hexdigest(),
    )


def is_published(folder: Path) -> bool:
    """Whether a store is there, whole or damaged."""
    return (folder / MANIFEST).is_file()


def _open_part(folder: Path, name: str, dtype: torch.dtype) -> Documents:
    return Documents(
        _map(folder / f"{name}_tokens.bin", dtype), _map(folder / f"{name}_starts.bin", torch.int64)
    )


def _map(path: Path, dtype: torch.dtype) -> Tensor:
    size = path.stat().st_size // dtype.itemsize
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)
