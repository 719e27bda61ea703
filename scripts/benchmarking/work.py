"""Lower bounds of the arithmetic and the memory traffic of an operation."""

from __future__ import annotations

from typing import NamedTuple

from benchmarking.report import DENSE_PAGED
from benchmarking.settings import BenchmarkSettings, FloorSettings, Heads
from infllm_flex.config import InfLLMConfig
from infllm_flex.selection import count_score_products, count_scored_keys
from infllm_flex_ops.sizes import ceil_div

_PRODUCTS = {"forward": 2.0, "backward": 5.0, "forward+backward": 7.0}
_PASSES = {"forward": 1, "backward": 3, "forward+backward": 4}


class Work(NamedTuple):
    """Arithmetic and memory traffic.

    Attributes:
        flops: Multiplications and additions.
        bytes: Bytes read and written.
        float8_flops: The part of ``flops`` that is products of float8 numbers.
    """

    flops: float
    bytes: float
    float8_flops: float = 0.0

    def __add__(self, other: object) -> Work:
        """Return the sum of both."""
        if not isinstance(other, Work):
            return NotImplemented
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def floor_ms(self, floor: FloorSettings) -> float:
        """Return the milliseconds of a device at its peak rates."""
        products = (self.flops - self.float8_flops) / floor.tflops
        products += self.float8_flops / (floor.float8_tflops or floor.tflops)
        return 1e3 * max(products, self.bytes / floor.terabytes) / 1e12


def work_of(op: str, mode: str, settings: BenchmarkSettings, heads: Heads, S: int) -> Work | None:
    """Return the least work of an operation; None where no bound is known.

    Args:
        op: Name of the operation in the CSV.
        mode: ``"forward"``, ``"backward"``, ``"forward+backward"`` or ``"decode"``.
        settings: The run; the settings of the operation are ``attention``.
        heads: ``Hq`` and ``Hkv``.
        S: Tokens.
    """
    if mode == "decode":
        return _work_of_step(op, settings, heads, S)
    B, D, config = settings.shapes.batch, settings.shapes.head_dim, settings.attention
    element = 4 if settings.run.dtype == "float32" else 2
    rows = 2 * B * (heads.query + heads.kv) * S * D * element  # q, k, v and the output
    if op == "select_blocks":
        dims = config.num_score_dims(D)
        queries_and_keys = rows / 2 * dims / D
        return _scores(config, heads, B * dims * S * S / 2) + Work(0.0, queries_and_keys)
    if op == "infllm_attention":
        select = work_of("select_blocks", "forward", settings, heads, S)
        attend = work_of("attend", mode, settings, heads, S)
        if select is None or attend is None or mode == "backward":
            return attend
        return select + attend
    own = visible_pairs(config, S)
    every = S * (S + 1) / 2
    pairs = {"attend": own, "attend_blocks": own, "dense": every, DENSE_PAGED: every}.get(op)
    if pairs is None:
        return None
    return Work(2.0 * _PRODUCTS[mode] * B * heads.query * D * pairs, float(rows * _PASSES[mode]))


def _work_of_step(op: str, settings: BenchmarkSettings, heads: Heads, S: int) -> Work | None:
    """Return the least work of one token over ``S`` cached ones: each visible key is read once."""
    B, D, config = settings.shapes.batch, settings.shapes.head_dim, settings.attention
    element = 4 if settings.run.dtype == "float32" else 2
    key_bytes = B * heads.kv * D * element
    dims = config.num_score_dims(D)
    select = _scores(config, heads, B * dims * S)
    in_float8 = config.score_dims > 0 and config.score_dtype == "float8"
    scored_bytes = B * heads.kv * dims * (1 if in_float8 else element)
    select += Work(0.0, scored_bytes * S * count_scored_keys(config))

    def attend(num_keys: int) -> Work:
        keys_and_values = 2.0 * num_keys
        return Work(2.0 * B * heads.query * D * keys_and_values, key_bytes * keys_and_values)

    return {
        "select_blocks": select,
        "infllm_attention": select + attend(min(S, config.budget_tokens)),
        "dense": attend(S),
        DENSE_PAGED: attend(S),
    }.get(op)


def _scores(config: InfLLMConfig, heads: Heads, pairs: float) -> Work:
    """Return the work of scores over ``pairs`` of a query, a token of its past and an element."""
    flops = 2.0 * pairs * count_score_products(config, heads.query, heads.kv)
    return Work(flops, 0.0, flops if config.score_dtype == "float8" else 0.0)


def visible_pairs(config: InfLLMConfig, S: int) -> float:
    """Count the pairs of a token and a visible key, per head."""
    block, budget = config.block_size, config.num_selected
    pairs = 0.0
    for own in range(ceil_div(S, block)):
        tokens = min(block, S - own * block)
        pairs += tokens * min(own, budget - 1) * block + tokens * (tokens + 1) / 2
    return pairs
