"""Where a measurement runs: its device, and the cells of a CSV that describe device and code."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from benchmarking.checkout import ROOT
from infllm_flex.training.parallel import pick_device

# Changes here that are not committed mark a row `+changes`.
_MEASURED = ("infllm_flex", "custom_ops", "scripts/benchmarking", "scripts/evaluation")


def prepare_device(name: str, threads: int) -> torch.device:
    """Return the device of ``run.device``, and set the number of CPU threads.

    Args:
        name: Name of the device.
        threads: CPU threads; 0 keeps PyTorch's number.

    Raises:
        ValueError: The device is not available.
    """
    device = pick_device(name)
    if threads:
        torch.set_num_threads(threads)
    return device


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return the cells for device, versions, commit and date."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "date": now.isoformat(timespec="seconds"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit, marked where the measured code has changes that are not in it."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", *_MEASURED).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
