"""Read a compiled kernel's instructions: how many one step of its inner loop takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_TARGET = re.compile(r"\((\.L_\w+)\)")
_PRODUCTS = ("HMMA", "HGMMA", "QMMA", "QGMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "DMMA")


class Loop(NamedTuple):
    """The instructions of a loop: how many, and how many of them are matrix products."""

    instructions: int
    products: int


def disassemble(cubin: bytes) -> str:
    """Disassemble a compiled kernel by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inner_loop(text: str) -> Loop | None:
    """Find the inner loop that does the work: the one with most products, or the longest.

    Args:
        text: The output of `disassemble`.

    Returns:
        Its instructions; None where the kernel has no loop.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.match(line):
            opcodes.append(found[1])
            target = _TARGET.search(found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                start = labels[target[1]]
                if start < len(opcodes) - 1:  # the last instruction of a kernel jumps to itself
                    spans.append((start, len(opcodes)))
    inner = [
        span
        for span in spans
        if not any(span[0] <= a and b <= span[1] and (a, b) != span for a, b in spans)
    ]
    loops = [Loop(end - start, _count_products(opcodes[start:end])) for start, end in inner]
    return max(loops, key=lambda loop: (loop.products, loop.instructions), default=None)


def _count_products(opcodes: list[str]) -> int:
    return sum(opcode.split(".")[0] in _PRODUCTS for opcode in opcodes)
