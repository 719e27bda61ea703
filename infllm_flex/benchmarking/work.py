"""How much arithmetic and memory traffic a call needs at least."""

from __future__ import annotations

from typing import NamedTuple

from infllm_flex.benchmarking.settings import BenchmarkSettings, FloorSettings, Heads
from infllm_flex.config import InfLLMConfig

_PRODUCTS = {"forward": 2.0, "backward": 5.0, "forward+backward": 7.0}
_PASSES = {"forward": 1, "backward": 3, "forward+backward": 4}


class Work(NamedTuple):
    """Operations, a multiplication and an addition two, and bytes read and written."""

    flops: float
    bytes: float

    def __add__(self, other: object) -> Work:
        """Both after one another."""
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_ms(self, floor: FloorSettings) -> float:
        """Milliseconds that a device at its limits needs."""
        return 1e3 * max(self.flops / floor.tflops, self.bytes / floor.terabytes) / 1e12


def work_of(op: str, mode: str, settings: BenchmarkSettings, heads: Heads, S: int) -> Work | None:
    """What an operation needs at least; None where nothing useful can be said.

    Args:
        op: As in the CSV.
        mode: ``"forward"``, ``"backward"``, ``"forward+backward"`` or ``"decode"``.
        settings: The run.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens.
    """
    if mode == "decode":
        return _work_of_step(op, settings, heads, S)
    B, D, config = settings.shapes.batch, settings.shapes.head_dim, settings.attention
    element = 4 if settings.run.dtype == "float32" else 2
    rows = 2 * B * (heads.query + heads.kv) * S * D * element  # q, k, v and the output
    if op == "select_blocks":
        compressed = S / config.kernel_stride
        keys = compressed if config.lse == "exact" else 1.25 * compressed
        queries_and_keys = rows / 2
        return Work(2.0 * B * heads.query * D * S * keys / 2, queries_and_keys)
    if op == "infllm_attention":
        select = work_of("select_blocks", "forward", settings, heads, S)
        attend = work_of("attend", mode, settings, heads, S)
        if select is None or attend is None or mode == "backward":
            return attend
        return select + attend
    own = visible_pairs(config, S)
    pairs = {"attend": own, "attend_blocks": own, "dense": S * (S + 1) / 2}.get(op)
    if pairs is None:
        return None
    return Work(2.0 * _PRODUCTS[mode] * B * heads.query * D * pairs, float(rows * _PASSES[mode]))


def _work_of_step(op: str, settings: BenchmarkSettings, heads: Heads, S: int) -> Work | None:
    """Of one token over ``S`` cached ones: every key that counts is read once, and its value."""
    B, D, config = settings.shapes.batch, settings.shapes.head_dim, settings.attention
    element = 4 if settings.run.dtype == "float32" else 2
    levels = 1.0 if config.lse == "exact" else 1.25
    scored = levels * S / config.kernel_stride
    attended = min(S, config.num_selected * config.block_size)
    keys = {
        "select_blocks": scored,
        "infllm_attention": scored + 2 * attended,
        "dense": 2 * S,
    }.get(op)
    if keys is None:
        return None
    return Work(2.0 * B * heads.query * D * keys, float(B * heads.kv * D * element * keys))


def visible_pairs(config: InfLLMConfig, S: int) -> float:
    """Pairs of a token and a key that it attends to, per head."""
    block, budget = config.block_size, config.num_selected
    pairs = 0.0
    for own in range(-(-S // block)):
        tokens = min(block, S - own * block)
        pairs += tokens * min(own, budget - 1) * block + tokens * (tokens + 1) / 2
    return pairs
