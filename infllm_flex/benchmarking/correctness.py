"""Nothing is timed that is wrong: the judges that speak before the clock starts."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex import reference
from infllm_flex.attention import infllm_attention
from infllm_flex.benchmarking.inputs import QKV, make_qkv, with_gradients
from infllm_flex.benchmarking.settings import BenchmarkSettings, Heads
from infllm_flex.config import InfLLMConfig
from infllm_flex.selection import default_scale, select_blocks

_ROOT = Path(__file__).parents[2]
_QUERIES = 40  # last ones of the sequence, which the slow reference computes too
_TIE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # scores so near may change places


class IncorrectError(RuntimeError):
    """The operators are wrong here; the message says which and by how much."""


def run_tests(arguments: Sequence[str]) -> None:
    """Run pytest in a process of its own.

    Args:
        arguments: Of pytest, seen from the root of the repository.

    Raises:
        IncorrectError: A test fails, none ran, or pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise IncorrectError("run.tests asks for pytest, which is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if ended.returncode:
        said = "\n".join((ended.stdout + ended.stderr).splitlines()[-12:])
        raise IncorrectError(f"{' '.join(arguments)} ended with {ended.returncode}:\n{said}")


def check_operators(settings: BenchmarkSettings, heads: Heads) -> None:
    """Compare choice, output and gradients with the float64 reference at a small length.

    Device, dtype, heads and attention settings are those of the run.

    Args:
        settings: The run.
        heads: ``Hq`` and ``Hkv``.

    Raises:
        IncorrectError: They differ by more than rounding.
    """
    config = settings.attention
    S = max((config.num_selected + 16) * config.block_size, config.dense_len)
    qkv = make_qkv(settings, heads, S, "independent")
    selected = select_blocks(qkv.query, qkv.key, config)
    _check_choice(qkv, selected, config, _TIE[settings.run.dtype])
    for engine in settings.engines:
        _check_attention(qkv, selected, dataclasses.replace(config, engine=engine))


def _check_choice(qkv: QKV, selected: Tensor, config: InfLLMConfig, tie: float) -> None:
    """Every block chosen must score as well as the least that the reference chooses."""
    query, key = qkv.query[:1, :, -_QUERIES:].cpu(), qkv.key[:1].cpu()
    ours, S = selected[0, :, -_QUERIES:].cpu(), key.shape[2]
    G, scale = query.shape[1] // key.shape[1], default_scale(query)
    expected = reference.select_blocks(query, key, config, scale=scale)[0]
    for h in range(key.shape[1]):
        group = query[0, h * G : (h + 1) * G]
        scores = reference.score_blocks(group, key[0, h], config, scale=scale)
        for s in range(_QUERIES):
            theirs, chosen = set(expected[h, s].tolist()), ours[h, s].tolist()
            if len(chosen) != len(expected[h, s]) or chosen != sorted(set(chosen)):
                raise IncorrectError(f"select_blocks: {chosen} is not an ascending choice")
            wrong, missed = set(chosen) - theirs, theirs - set(chosen)
            best, least = (scores[s, sorted(x)] for x in (missed, wrong))
            if wrong and bool(best.max() > least.min() * (1 + tie)):
                token = S - _QUERIES + s
                raise IncorrectError(
                    f"select_blocks: token {token} of head {h} has {sorted(wrong)} chosen instead "
                    f"of {sorted(missed)}"
                )


def _check_attention(qkv: QKV, selected: Tensor, config: InfLLMConfig) -> None:
    scale, block_size = default_scale(qkv.query), config.block_size
    mask = reference.attention_mask(selected[:, :, -_QUERIES:], block_size, qkv.key.shape[2])
    mask = mask.to(qkv.query.device)
    grad_out = torch.zeros_like(qkv.query)
    grad_out[:, :, -_QUERIES:] = torch.randn_like(grad_out[:, :, -_QUERIES:])

    with torch.no_grad():
        inference = infllm_attention(*qkv, config, selected=selected)[:, :, -_QUERIES:]
    ours = _run(qkv, lambda q, k, v: infllm_attention(q, k, v, config, selected=selected), grad_out)
    exact = _run(
        QKV(*(x.double() for x in qkv)),
        lambda q, k, v: reference.masked_attention(q[:, :, -_QUERIES:], k, v, mask, scale=scale),
        grad_out[:, :, -_QUERIES:].double(),
    )
    plain = _run(
        qkv,
        lambda q, k, v: _plain(q[:, :, -_QUERIES:], k, v, mask),
        grad_out[:, :, -_QUERIES:],
    )
    for name, actual, true, same in zip(
        ("output", "dq", "dk", "dv"), ours, exact, plain, strict=True
    ):
        _check_error(f"{config.engine}, {name}", actual[:, :, -len(true[0, 0]) :], true, same)
    _check_error(f"{config.engine}, output without gradients", inference, exact[0], plain[0])


def _run(
    qkv: QKV, attend: Callable[[Tensor, Tensor, Tensor], Tensor], grad_out: Tensor
) -> list[Tensor]:
    """The output at the last queries, and the gradients."""
    leaves = with_gradients(qkv)
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad_out)
    return [out.detach()[:, :, -_QUERIES:], *gradients]


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked attention by plain operations in the run's precision: the error that is allowed."""
    G = q.shape[1] // k.shape[1]
    k, v, mask = (x.repeat_interleave(G, dim=1) for x in (k, v, mask))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _check_error(what: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    error, allowed = ((x.double() - exact).abs().max().item() for x in (actual, plain))
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    limit = 3 * (allowed + rounding)
    if not error <= limit:
        raise IncorrectError(f"infllm_attention ({what}): error {error:.3g}, allowed {limit:.3g}")
