"""The token store: the tokens of all documents in memory-mapped files.

``<part>_tokens.bin`` holds the concatenated tokens. ``<part>_starts.bin`` holds the index of each
document's first token and the number of tokens, as int64.
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
        tokens: uint8 or int32 ``[N]``, the tokens of all documents.
        starts: int64 ``[D + 1]``, the index in ``tokens`` of each document's first token, and N.
    """

    tokens: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Tensor:
        """The tokens of one document, as a view."""
        return self.tokens[int(self.starts[number]) : int(self.starts[number + 1])]


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a run's text.

    Attributes:
        train: Training documents.
        held_out: Held-out documents.
        vocabulary: Size of the vocabulary.
        damaged: Number of damaged documents, which are left out.
        examples: Error messages of the first damaged documents.
        identity: Equal exactly for equal tokens, on any machine.
    """

    train: Documents
    held_out: Documents
    vocabulary: int
    damaged: int
    examples: tuple[str, ...]
    identity: str


def open_store(folder: Path, checksums: bool = True) -> TokenStore:
    """Open a published store by mapping its files into memory.

    Args:
        folder: The folder of the store.
        checksums: Whether to read the files once and compare them with their checksums.

    Raises:
        DataError: The store is damaged.
    """
    try:
        verify(folder, checksums)
        files = read_manifest(folder)
        about = json.loads((folder / ABOUT).read_text())
        dtype = _DTYPES[about["dtype"]]
        train, held_out = (_open_part(folder, name, dtype) for name in PARTS)
    except (BrokenFolderError, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{folder} is damaged ({error}): delete it and start again, which rebuilds it"
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
    """Whether a store exists, damaged or not."""
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
