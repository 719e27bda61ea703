"""The estimated memory of a run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from infllm_flex.training.layer_transforms import run_layers
from infllm_flex.training.loss import LanguageLoss
from infllm_flex.training.memory_estimate import estimate_memory
from infllm_flex.training.model import build_meta_model, build_model, decoder_layers
from infllm_flex.training.optim import Optimizers
from infllm_flex.training.settings import (
    MemorySettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    TinyModelSettings,
)
from infllm_flex.training.stage_attention import stage_attention
from tests.checkout import ROOT, environment
from tests.training.runs import ATTENTION, settings, stage

MODEL = ModelSettings(
    tiny=TinyModelSettings(
        num_layers=3, hidden_size=64, intermediate_size=160, num_heads=4, num_kv_heads=2
    )
)
LENGTH = 256
GPU = torch.device("cuda")  # an estimate needs no GPU


@pytest.fixture(scope="module")
def model():
    return build_model(MODEL, LENGTH)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_are_estimated_to_the_byte(tmp_path, texts, model, kind):
    run = settings(tmp_path, texts, model=MODEL, optim=OptimSettings(kind=kind))
    found = estimate_memory(build_meta_model(MODEL, LENGTH), run, 1, GPU)
    optimizers = Optimizers(model, run.optim)
    optimizers.materialise()
    weights = sum(weight.nbytes for weight in model.parameters())
    state = sum(t.nbytes for t in optimizers.tensors().values() if t.ndim)
    assert (found.weights, found.gradients, found.optimizer) == (weights, weights, state)


def kept_for_the_backward(run, length):
    """Bytes that autograd keeps for the backward pass, without the weights."""
    model = build_model(MODEL, length)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(256, (2, length))
    with (
        stage_attention(model, run.stages["only"], run.attention),
        run_layers(decoder_layers(model), run, torch.device("cpu")),
        saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        LanguageLoss(model)(tokens, input_ids=tokens, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("attention", ["dense", "sparse", "sparse by position"])
def test_activations_are_estimated_within_a_half(tmp_path, texts, attention):
    length, kept, found = 2048, [], []
    settings_of = {"sparse by position": replace(ATTENTION, dense_len=1024, dense_by="position")}
    for checkpointing in (False, True):
        run = settings(
            tmp_path,
            texts,
            model=MODEL,
            stages={"only": stage(max_length=length, attention=attention.split()[0])},
            attention=settings_of.get(attention, ATTENTION),
            memory=MemorySettings(activation_checkpointing=checkpointing),
        )
        kept.append(kept_for_the_backward(run, length))
        found.append(estimate_memory(build_meta_model(MODEL, length), run, 1, GPU).activations)
    assert 0.75 < found[0] / kept[0] < 1.5
    # The recomputed layer, one of three, adds to the kept tensors.
    assert 0.75 < found[1] / (kept[1] + kept[0] / 3) < 1.5


@pytest.mark.parametrize(
    ("attention", "checkpointing", "heap"),
    [
        pytest.param("dense", False, "fragmented", marks=pytest.mark.slow),
        ("sparse", False, "fragmented"),
        ("dense", True, "fragmented"),
        pytest.param("sparse", False, "returned", marks=pytest.mark.slow),
        ("dense", True, "returned"),
    ],
)
def test_a_run_on_the_cpu_stays_within_the_estimate(
    tmp_path, texts, attention, checkpointing, heap
):
    """In a process of its own, so that its peak memory is that of the run.

    Fragmentation differs between equal runs. A C library that returns each large tensor to the
    system when it is freed has none, and the rest of the estimate is then tested by itself.
    """
    code = f"""
import torch
from pathlib import Path
from infllm_flex.training.memory_estimate import estimate_memory
from infllm_flex.training.loop import train
from infllm_flex.process_memory import peak_resident_bytes
from infllm_flex.training.model import build_meta_model
from infllm_flex.training.settings import MemorySettings, ModelSettings, TinyModelSettings
from tests.training.runs import settings, stage

model = ModelSettings(
    tiny=TinyModelSettings(num_layers=6, hidden_size=384, intermediate_size=1024, num_heads=6)
)
run = settings(
    Path({str(tmp_path)!r}),
    Path({str(texts)!r}),
    model=model,
    stages={{"only": stage(max_length=1024, batch_size=1, steps=2, attention={attention!r})}},
    memory=MemorySettings(activation_checkpointing={checkpointing}),
)
torch.set_num_threads(1)
outline = build_meta_model(model, 1024)
estimate = estimate_memory(outline, run, 1, torch.device("cpu"))
train(run, show=False)
print(estimate.total, estimate.fragmentation, peak_resident_bytes())
"""
    if heap == "returned" and sys.platform != "linux":
        pytest.skip("the variable is one of the GNU C library")
    variables = {"MALLOC_MMAP_THRESHOLD_": str(2**17)} if heap == "returned" else {}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**variables),
        check=True,
    )
    estimate, fragmentation, taken = map(int, ended.stdout.split())
    if heap == "returned":
        estimate -= fragmentation
    assert taken <= estimate < 1.25 * taken


def test_fsdp_shards_and_offloading_moves_weights_off_the_device(tmp_path, texts):
    outline = build_meta_model(MODEL, LENGTH)

    def estimate(processes, **changes):
        return estimate_memory(
            outline, settings(tmp_path, texts, model=MODEL, **changes), processes, GPU
        )

    one, four = estimate(1), estimate(4)
    assert four.weights == one.weights // 4
    assert one.gathered == 0 < four.gathered
    copies = estimate(4, parallel=ParallelSettings(kind="ddp"))
    assert (copies.weights, copies.gathered) == (one.weights, 0)
    offloaded = estimate(4, memory=MemorySettings(cpu_offload=True))
    assert offloaded.total == offloaded.gathered + offloaded.activations
