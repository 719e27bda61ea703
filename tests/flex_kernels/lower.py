"""Write the kernels that PyTorch makes of FlexAttention in levels, and the resources of each.

``python -m tests.flex_kernels.lower CASE.json KERNELS.json``; the case is that of ``lower_levels``.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from benchmarking.ahead_of_time import resource_usage
from infllm_flex.engines.flex_level_masks import build_level_masks, choose_levels
from infllm_flex.engines.flex_options import training_options
from tests.flex_kernels.pretended_gpu import lower, pretend
from tests.inputs import small_config

_KERNEL = re.compile(r"async_compile\.triton\('(triton_tem_\w+)', '''(.*?)'''", re.DOTALL)
_GRID = re.compile(r"triton_tem_\w+\.run\(.*?(\d+), (\d+), (\d+), stream")


def lower_levels(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Lower each level's forward and backward.

    Args:
        case: ``capability``, ``groups``, ``S``, ``head_dim``, ``dtype``, ``block_size``; whether to
            ``compile`` the kernels.
    """
    pretend(case["capability"])
    S, D, block, dtype = (case[x] for x in ("S", "head_dim", "block_size", "dtype"))
    config = small_config(block_size=block, window_size=2 * block)
    levels = choose_levels(case["groups"], backward=True)
    kernels = []
    for i, level in enumerate(levels):
        with FakeTensorMode(allow_non_fake_inputs=True):
            lengths = (S * level.rows, S, S)
            q, k, v = (
                torch.empty(1, 2, n, D, dtype=getattr(torch, dtype), requires_grad=True)
                for n in lengths
            )
            selected = torch.empty(1, 2, S, 5, dtype=torch.int32)
            masks = build_level_masks(selected, config, levels, kv_len=S, q_offset=0, backward=True)
            sources = lower(
                _attend(masks[i], i == len(levels) - 1, q, level.rows, case["capability"]), q, k, v
            )
        for direction, source in zip(("forward", "backward"), sources, strict=True):
            ((name, text),) = _KERNEL.findall(source)
            grid = [int(x) for x in _GRID.search(source).groups()]
            kernel = {"level": list(level), "direction": direction, "name": name, "text": text}
            taken = _compile(name, text, case["capability"]) if case["compile"] else {}
            kernels.append(kernel | {"grid": grid} | taken)
    return kernels


def _attend(mask: BlockMask, is_last: bool, q: torch.Tensor, rows: int, capability: int) -> Any:
    mask, options = training_options(mask, q.shape[3], q.dtype, capability)
    if is_last:  # the mask's own reads q_offset from a tensor, which cannot be relabelled
        mask.mask_mod = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx // rows

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, aux = flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=0.25,
            kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )
        return out, aux.lse

    return attend


def _compile(name: str, text: str, capability: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        meta = kernel.triton_meta
        source = ASTSource(
            fn=kernel.fn,
            signature=dict(meta["signature"]),
            constexprs=dict(meta["constants"]),
            attrs=dict(meta["configs"][0]),
        )
        options = {x: int(re.search(rf"{x}=(\d+)", text)[1]) for x in ("num_warps", "num_stages")}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options)
    usage = resource_usage(compiled.asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": compiled.metadata.shared,
        **options,
    }


if __name__ == "__main__":
    case = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(lower_levels(case)))
