"""Peak memory of one forward and backward.

On the CPU two processes run this file. One only allocates q, k, v and their gradients; the other
runs attention. The difference of their peaks is the memory of attention itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarking.checkout import ROOT, python_environment
from benchmarking.inputs import QKV, make_qkv, with_gradients
from benchmarking.settings import BenchmarkSettings, Heads
from infllm_flex.attention import infllm_attention
from infllm_flex.process_memory import peak_resident_bytes
from infllm_flex.strict_yaml import build_dataclass, load_yaml, to_yaml

_MIB = 2**20
_FACTOR, _ALLOWANCE_MIB = 3, 512
_WARM_TOKENS = 512


def tensors_mib(settings: BenchmarkSettings, heads: Heads, S: int) -> float:
    """Size of q, k, v and their gradients together."""
    element = 4 if settings.run.dtype == "float32" else 2
    values = settings.shapes.batch * (heads.query + 2 * heads.kv) * S * settings.shapes.head_dim
    return 2 * values * element / _MIB


def limit_mib(settings: BenchmarkSettings, heads: Heads, S: int) -> float:
    """Upper limit of the peak of forward and backward, q, k, v and gradients included."""
    return _FACTOR * tensors_mib(settings, heads, S) + _ALLOWANCE_MIB


def peak_mib(settings: BenchmarkSettings, heads: Heads, S: int, folder: Path) -> float:
    """Measure the peak of ``infllm_attention`` forward and backward, q, k, v, gradients included.

    Args:
        settings: The run; the first engine is measured.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens.
        folder: Folder for the settings file of the two processes.

    Raises:
        RuntimeError: A process failed; the message ends with the last lines of its output.
    """
    if settings.run.device == "cuda":
        return _cuda_peak(settings, heads, S)
    config = folder / "memory.yaml"
    config.write_text(to_yaml(settings))
    base, whole = (_process_peak(config, heads, S, attends) for attends in (False, True))
    return tensors_mib(settings, heads, S) + (whole - base) / _MIB


def _step(qkv: QKV, settings: BenchmarkSettings) -> None:
    infllm_attention(*qkv, settings.attention).backward(torch.ones_like(qkv.query))


def _cuda_peak(settings: BenchmarkSettings, heads: Heads, S: int) -> float:
    _step(with_gradients(make_qkv(settings, heads, S, "drifting")), settings)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    qkv = with_gradients(make_qkv(settings, heads, S, "drifting"))
    torch.cuda.reset_peak_memory_stats()
    _step(qkv, settings)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / _MIB


def _process_peak(config: Path, heads: Heads, S: int, attends: bool) -> int:
    job = json.dumps({"config": str(config), "heads": heads, "length": S, "attends": attends})
    command = [sys.executable, "-m", __name__, job]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=python_environment()
    )
    if ended.returncode:
        last_lines = "\n".join(ended.stderr.splitlines()[-3:])
        raise RuntimeError(
            f"the process that measures memory ended with {ended.returncode}: {last_lines}"
        )
    return int(ended.stdout.split()[-1])


def _main() -> None:
    job = json.loads(sys.argv[1])
    settings = build_dataclass(BenchmarkSettings, load_yaml(job["config"]))
    heads = Heads(*job["heads"])
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    # Both processes load code and start thread pools first, so that neither is measured.
    warm = max(_WARM_TOKENS, settings.attention.dense_len)
    _step(with_gradients(make_qkv(settings, heads, warm, "drifting")), settings)
    qkv = with_gradients(make_qkv(settings, heads, job["length"], "drifting"))
    if job["attends"]:
        _step(qkv, settings)
    else:
        for x in qkv:
            x.grad = torch.ones_like(x)
    sys.stdout.write(f"{peak_resident_bytes()}\n")


if __name__ == "__main__":
    _main()
