"""Tensors that each process holds a part of, in safetensors files, by PyTorch's own engine.

torch.distributed.checkpoint writes and reads them through its Hugging Face storage: every file is
plain safetensors with the place of its parts in the header. Its default storage is not used: that
unpickles an index when it loads.
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
from infllm_flex.training.collectives import gather, num_ranks, rank

_FILE_BYTES = 2**31  # DCP builds a file in memory before it writes it
_OTHER = "it is of another model or optimizer"
Outline = dict[str, tuple[tuple[int, ...], torch.dtype]]


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Write this process's parts of all tensors. Every process must call it.

    Args:
        folder: An empty folder.
        tensors: By name. DTensors are written in parts; of others that several processes have
            under one name, one copy.

    Returns:
        Names of the files that this process wrote.

    Raises:
        OSError: A process could not write.
        CheckpointError: The tensors do not fit together.
    """
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_files_of(tensors), save_distributed=True
    )
    with _engine(folder):
        save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    return [path.name for path in folder.glob(f"shard-{rank() + 1:05d}-*")]


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors with what was written, however it was cut. Every process must call it.

    Args:
        folder: What `write_shards` filled, from any number of processes.
        tensors: By name; each process may ask for others.

    Raises:
        CheckpointError: A tensor is missing, or of another shape or type.
    """
    found = outline(folder)
    for name, tensor in tensors.items():
        if name not in found:
            raise CheckpointError(
                f"{folder}: it has no {name}; it is of another model or optimizer"
            )
        wanted = (tuple(tensor.shape), tensor.dtype)
        if found[name] != wanted:
            raise CheckpointError(
                f"{folder}: {name} is {_words(found[name])} there and {_words(wanted)} here; "
                f"{_OTHER}"
            )
    reader = HuggingFaceStorageReader(str(folder))
    with _engine(folder), torch.no_grad():
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def fill_alone(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill whole tensors by this process alone, whatever the others do."""
    with _engine(folder):
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def outline(folder: Path) -> Outline:
    """Shape and type of every tensor in a folder, by name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _files_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which of a process's files each tensor goes to; for the tensors of all processes."""
    sizes: dict[str, int] = {}
    for theirs in gather(json.dumps({name: t.numel() * t.itemsize for name, t in tensors.items()})):
        sizes |= json.loads(theirs)
    files, number, size = {}, 1, 0
    for name in sorted(sizes):
        nbytes = sizes[name] // num_ranks()
        if size and size + nbytes > _FILE_BYTES:
            number, size = number + 1, 0
        files[name] = number
        size += nbytes
    return files


def _words(entry: tuple[tuple[int, ...], torch.dtype]) -> str:
    shape, dtype = entry
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


@contextmanager
def _engine(folder: Path) -> Iterator[None]:
    """The engine's errors as ours; its note that a single process is alone is no news."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:  # not an Exception, so nothing else would catch it
        number, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise cause from None
        raise CheckpointError(f"{folder}: process {number}: {cause}") from cause
