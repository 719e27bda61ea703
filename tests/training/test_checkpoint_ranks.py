"""Checkpoints of several processes: each writes its shards, any number of processes reads them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from infllm_flex.training import checkpoints
from infllm_flex.training.checkpoints import Checkpoint
from infllm_flex.training.collectives import (
    all_gather_text,
    num_ranks,
    on_all_ranks,
    on_first_rank,
    rank,
)
from tests.training.forked import run_ranks

# Fewer rows than processes, an uneven number of rows, no dimension, sharded by columns.
SHAPES = {"even": (8, 6), "uneven": (7, 3), "few": (2, 5), "one": (1,), "long": (3, 16)}


def whole(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def spread(tensors):
    """Shard tensors as FSDP does: most by rows, one by columns, one replicated."""
    if num_ranks() == 1:
        return tensors
    mesh = init_device_mesh("cpu", (num_ranks(),))
    cuts = {"long": Shard(1), "one": Replicate()}
    return {n: distribute_tensor(t, mesh, [cuts.get(n, Shard(0))]) for n, t in tensors.items()}


def save(folder, step=1):
    torch.manual_seed(rank() + 10)
    checkpoint = Checkpoint(
        step=step,
        text_identity="t",
        weights=spread(whole()),
        optimizer={"0.step": torch.tensor(5.0), **spread(whole(1))},
        random_state={"cpu": torch.get_rng_state()},
        config_json="{}\n",
    )
    return str(checkpoints.save(folder, checkpoint, keep=2))


def load(folder):
    """Whether every bit was restored, and this process's next random number."""
    path = checkpoints.newest(folder)
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    weights, optimizer = spread(zeros), spread({n: t.clone() for n, t in zeros.items()})
    optimizer["0.step"] = torch.tensor(0.0)
    random_state = {"cpu": torch.get_rng_state()}
    known = checkpoints.load(path, weights, optimizer, random_state)
    assert optimizer.pop("0.step") == 5
    for found, expected in ((weights, whole()), (optimizer, whole(1))):
        for name, tensor in found.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(full, expected[name]), name
    if not known:
        return None
    torch.set_rng_state(random_state["cpu"])
    return torch.rand(()).item()


def first_random(number):
    return torch.rand((), generator=torch.Generator().manual_seed(number + 10)).item()


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2), (2, 4), (4, 3), (3, 1)])
def test_any_number_of_processes_reads_what_any_number_wrote(tmp_path, writers, readers):
    folder = tmp_path / "checkpoints"
    if writers == 1:
        save(folder)
    else:
        saved = run_ranks(writers, tmp_path, save, folder)
        assert saved == [str(folder / "step-00000001")] * writers
    found = [load(folder)] if readers == 1 else run_ranks(readers, tmp_path, load, folder)
    assert found == [first_random(r) if r < writers else None for r in range(readers)]
    state = checkpoints.read_state(folder / "step-00000001")
    assert state.processes == writers


def test_the_exported_model_does_not_depend_on_the_number_of_processes(tmp_path):
    save(tmp_path / "one")
    run_ranks(3, tmp_path, save, tmp_path / "three")
    hashes = set()
    for name in ("one", "three"):
        model = checkpoints.export_newest(tmp_path / name, tmp_path / f"model-{name}")
        hashes.add(hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest())
    assert len(hashes) == 1


def damage_and_find(folder):
    if rank() == 0:
        newer = folder / "step-00000002"
        last = max(newer.glob("shard-*"))
        data = bytearray(last.read_bytes())
        data[-1] ^= 1
        last.write_bytes(data)
    dist.barrier()
    return checkpoints.newest(folder).name


@pytest.mark.filterwarnings("ignore:skipped a damaged checkpoint")
def test_damage_in_the_shard_of_any_process_makes_all_use_the_previous_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        run_ranks(2, tmp_path, save, folder, step)
    assert run_ranks(2, tmp_path, damage_and_find, folder) == ["step-00000001"] * 2


def save_with_a_full_disk(folder):
    if rank() == 1:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        os.fsync = full
    return save(folder, 2)


def test_a_full_disk_of_one_process_fails_all_and_leaves_the_last_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    run_ranks(2, tmp_path, save, folder)
    first, second = run_ranks(2, tmp_path, save_with_a_full_disk, folder)
    assert re.match(r"(OSError|RankError): .*No space left on device", first)
    assert re.match(
        r"OSError: \S+step-00000002 was not written: No space left on device; earlier checkpoints "
        r"in \S+ are kept",
        second,
    )
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert checkpoints.newest(folder).name == "step-00000001"


def talk():
    texts = all_gather_text("ä" * rank())
    with pytest.raises(Exception, match=r"process 1: ValueError: no|^no$"):
        on_all_ranks(lambda: None if rank() != 1 else fail())
    with pytest.raises(Exception, match=r"process 0: ValueError: no|^no$"):
        on_first_rank(fail)
    return json.dumps([texts, on_first_rank(lambda: 7)])


def fail():
    raise ValueError("no")


def test_a_failure_in_one_process_is_raised_in_all(tmp_path):
    found = [json.loads(text) for text in run_ranks(3, tmp_path, talk)]
    assert [texts for texts, _ in found] == [["", "ä", "ää"]] * 3
    assert [result for _, result in found] == [7, None, None]
