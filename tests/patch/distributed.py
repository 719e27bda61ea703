"""The cases that each of two processes runs for test_distributed.py, and their outcomes."""

import os
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import infllm_flex as ifx
from tests.patch.library_models import TuneStyle
from tests.patch.models import LONG, SETTINGS, build, tokens
from tests.patch.plain_models import plain_model

WORLD = 2
MODELS = {
    "generic": plain_model,
    "torchtune": lambda: plain_model(TuneStyle),
    "transformers": build,
}


def main():
    """Run all cases as one of the processes, and write a line per case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, make in MODELS.items():
        expected = gradients(ifx.patch_model(make(), SETTINGS), tokens(LONG, batch=WORLD))
        for case in CASES:
            try:
                outcome = CASES[case](make, mesh, expected)
            except Exception:
                outcome = traceback.format_exc().replace("\n", " | ")
            if dist.get_rank() == 0:
                sys.stdout.write(f"{name}, {case}: {outcome}\n")
    dist.destroy_process_group()


def gradients(model, batch):
    out = model(batch)
    logits = getattr(out, "logits", out)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten()).backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.replace("module.", "").replace("_orig_mod.", "")] = grad
    return found


def compare(model, expected):
    """Whether this process's part of the batch, averaged with the other's, gives its gradients."""
    ours = gradients(model, tokens(LONG, batch=WORLD)[dist.get_rank()][None])
    assert ours.keys() == expected.keys()
    for name, their in expected.items():
        torch.testing.assert_close(ours[name], their, rtol=1e-3, atol=1e-5, msg=name)


def blocks_of(model):
    return model.h if hasattr(model, "h") else model.model.layers


def attention_of(block):
    return block.attn if hasattr(block, "attn") else block.self_attn


def shard(model, mesh, attention):
    for block in blocks_of(model):
        if attention:
            fully_shard(attention_of(block), mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def ddp(make, mesh, expected):
    compare(DistributedDataParallel(ifx.patch_model(make(), SETTINGS)), expected)
    model = DistributedDataParallel(make())
    compare(ifx.patch_model(model, SETTINGS), expected)
    ifx.unpatch_model(model)
    assert not any(row.sparse for row in ifx.describe(model))
    return "ok"


def ddp_compiled(make, mesh, expected):
    model = DistributedDataParallel(ifx.patch_model(make(), SETTINGS))
    compare(torch.compile(model, backend="aot_eager"), expected)
    return "ok"


def patch_then_shard(make, mesh, expected, attention=False):
    model = ifx.patch_model(make(), SETTINGS)
    shard(model, mesh, attention)
    compare(model, expected)
    if attention and not hasattr(model, "config"):
        # The swapped class cannot be restored below the class that fully_shard put over it.
        with pytest.raises(ValueError, match=r"FSDP.*unpatch before sharding"):
            ifx.unpatch_model(model)
        assert all(row.sparse for row in ifx.describe(model))
        return "ok"
    ifx.unpatch_model(model)
    assert not any(row.sparse for row in ifx.describe(model))
    return "ok"


def shard_then_patch(make, mesh, expected, attention=False):
    model = make()
    shard(model, mesh, attention)
    classes = [type(module) for module in model.modules()]
    compare(ifx.patch_model(model, SETTINGS), expected)
    ifx.unpatch_model(model)
    assert [type(module) for module in model.modules()] == classes
    return "ok"


def sharded_and_compiled(make, mesh, expected):
    model = ifx.patch_model(make(), SETTINGS)
    for block in blocks_of(model):
        block.compile(backend="aot_eager")
    shard(model, mesh, attention=False)
    compare(model, expected)
    return "ok"


CASES = {
    "DDP": ddp,
    "DDP, compiled": ddp_compiled,
    "patch, then shard blocks": patch_then_shard,
    "shard blocks, then patch": shard_then_patch,
    "patch, then shard attention": lambda *given: patch_then_shard(*given, attention=True),
    "shard attention, then patch": lambda *given: shard_then_patch(*given, attention=True),
    "patch, compile blocks, shard": sharded_and_compiled,
}


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"] = sys.argv[1:]
    main()
