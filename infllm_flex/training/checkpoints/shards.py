"""Sharded tensors in safetensors files, written and read by ``torch.distributed.checkpoint``.

Its Hugging Face storage writes plain safetensors files with the offsets of the shards in their
headers. Its default storage is not used, because that unpickles an index.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from infllm_flex.training.checkpoints.errors import CheckpointError
from infllm_flex.training.collectives import all_gather_text, num_ranks, rank

_FILE_BYTES = 2**31  # DCP builds a whole file in memory before it writes it
Outline = dict[str, tuple[tuple[int, ...], torch.dtype]]


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Write this process's shards of all tensors. All processes must call it.

    Args:
        folder: An empty folder.
        tensors: Tensors by name. DTensors are written as shards. Other tensors that several
            processes hold under one name are written once.

    Returns:
        Names of the files that this process wrote.

    Raises:
        OSError: A process could not write.
        CheckpointError: The processes hold incompatible tensors.
    """
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_assign_files(tensors), save_distributed=True
    )
    with _converted_errors(folder):
        save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    return [path.name for path in folder.glob(f"shard-{rank() + 1:05d}-*")]


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read into tensors with any sharding. All processes must call it.

    Args:
        folder: A folder that `write_shards` filled, from any number of processes.
        tensors: Tensors by name; the names may differ between processes.

    Raises:
        CheckpointError: A tensor is missing, or has another shape or dtype.
    """
    found = read_outline(folder)
    for name, tensor in tensors.items():
        if name not in found:
            raise CheckpointError(
                f"{folder} has no {name}: the checkpoint belongs to another model or optimizer"
            )
        wanted = (tuple(tensor.shape), tensor.dtype)
        if found[name] != wanted:
            raise CheckpointError(
                f"{folder}: {name} is {_describe(found[name])} in the checkpoint and "
                f"{_describe(wanted)} in this run: the checkpoint belongs to another model or "
                "optimizer"
            )
    reader = HuggingFaceStorageReader(str(folder))
    with _converted_errors(folder), torch.no_grad():
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def read_on_this_rank(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read into unsharded tensors, without the other processes."""
    with _converted_errors(folder):
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def read_outline(folder: Path) -> Outline:
    """Shape and dtype of every tensor in a folder, by name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _assign_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor goes to, for the tensors of all processes."""
    own_sizes = {name: t.numel() * t.itemsize for name, t in tensors.items()}
    sizes: dict[str, int] = {}
    for rank_sizes in all_gather_text(json.dumps(own_sizes)):
        sizes |= json.loads(rank_sizes)
    files, number, size = {}, 1, 0
    for name in sorted(sizes):
        nbytes = sizes[name] // num_ranks()
        if size and size + nbytes > _FILE_BYTES:
            number, size = number + 1, 0
        files[name] = number
        size += nbytes
    return files


def _describe(entry: tuple[tuple[int, ...], torch.dtype]) -> str:
    shape, dtype = entry
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


@contextmanager
def _converted_errors(folder: Path) -> Iterator[None]:
    """Raise DCP's errors as OSError or CheckpointError; silence its note about a single process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:  # derives from BaseException
        number, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise cause from None
        raise CheckpointError(f"{folder}: process {number}: {cause}") from cause
