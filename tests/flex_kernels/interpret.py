"""Run lowered kernels in Triton's interpreter, over real lists: attention and its gradients.

``TRITON_INTERPRET=1 python -m tests.flex_kernels.interpret CASE.json KERNELS.json OUT.pt``

Case and kernels are files of ``lower``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_flex.engines.flex_compiled import fold_queries, merge_attention, unfold_queries
from infllm_flex.engines.flex_level_masks import Level, build_level_masks
from tests.custom_ops.quick_interpreter import hasten_interpreter
from tests.inputs import make_qkv, make_selected, small_config


def run(case: dict[str, Any], kernels: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return ``out`` of attention and the gradients ``dq``, ``dk``, ``dv``."""
    S, D, G, block = (case[x] for x in ("S", "head_dim", "groups", "block_size"))
    inputs = {"Hq": 2 * G, "Hkv": 2, "D": D}
    q, k, v = make_qkv(S, **inputs)
    grad_out = make_qkv(S, **inputs, seed=1)[0]
    config = small_config(block_size=block, window_size=2 * block)
    forward, backward = kernels[::2], kernels[1::2]
    levels = [Level(*kernel["level"]) for kernel in forward]
    selected = make_selected(S, block_size=block)
    masks = build_level_masks(selected, config, levels, kv_len=S, q_offset=0, backward=True)
    nothing = torch.empty(0)

    rows, outs, lses = [], [], []
    for kernel, mask, level in zip(forward, masks, levels, strict=True):
        rows.append(fold_queries(q, 2, level.rows).contiguous())
        outs.append(torch.full_like(rows[-1], torch.nan))
        lses.append(torch.full(rows[-1].shape[:3], torch.nan))  # base 2
        lists = (mask.kv_num_blocks, mask.kv_indices, nothing, nothing)
        scores = torch.empty_like(lses[-1])
        _launch(kernel, rows[-1], k, v, lses[-1], scores, *lists, outs[-1])

    parts = [unfold_queries(x, G, level.rows) for x, level in zip(outs, levels, strict=True)]
    natural_lses = [
        unfold_queries(x, G, n.rows) * math.log(2) for x, n in zip(lses, levels, strict=True)
    ]
    leaves = [x.clone().requires_grad_() for x in (*parts, *natural_lses)]
    out = merge_attention(leaves[: len(levels)], leaves[len(levels) :])
    grads = torch.autograd.grad(out, leaves, grad_out)

    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for i, (kernel, mask, level) in enumerate(zip(backward, masks, levels, strict=True)):
        dout, dlse = (_fold(x, level.rows) for x in (grads[i], grads[len(levels) + i]))
        delta = (outs[i] * dout).sum(-1) - dlse
        dq_rows = torch.full_like(rows[i], torch.nan)
        dk_part, dv_part = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
        lists = (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices)
        tensors = (rows[i], k, v, lses[i], delta, dout, dq_rows, dv_part)
        _launch(kernel, *tensors, *lists, *(nothing,) * 4, dk_part)
        dq += unfold_queries(dq_rows, G, level.rows)
        dk, dv = dk + dk_part, dv + dv_part
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def _fold(x: Tensor, rows: int) -> Tensor:
    """Apply ``fold_queries`` to a tensor with D values or one value per row."""
    wide = x if x.dim() == 4 else x[..., None]
    folded = fold_queries(wide, 2, rows)
    return folded.contiguous() if x.dim() == 4 else folded[..., 0].contiguous()


def _launch(kernel: dict[str, Any], *args: Tensor) -> None:
    text = re.sub(r"@triton_heuristics\.template\(.*?\n\)\n", "", kernel["text"], flags=re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("kernel", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        getattr(module, kernel["name"])[tuple(kernel["grid"])](*args)


if __name__ == "__main__":
    hasten_interpreter()
    case, kernels = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    torch.save(run(case, kernels), sys.argv[3])
