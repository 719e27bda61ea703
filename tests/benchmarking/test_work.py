"""Lower bounds of arithmetic, and the limit of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarking.memory import limit_mib, tensors_mib
from benchmarking.settings import Heads
from benchmarking.work import visible_pairs, work_of
from infllm_flex import select_blocks
from infllm_flex.reference import attention_mask
from tests.inputs import make_qkv as draw_qkv


def test_useful_pairs_are_those_of_the_mask(settings):
    S, config = 205, settings.attention
    selected = select_blocks(*draw_qkv(S)[:2], config)
    seen = attention_mask(selected, config.block_size, S)[0, 0].sum()
    assert visible_pairs(config, S) == seen
    attend = work_of("attend", "forward", settings, Heads(4, 2), S)
    assert attend.flops == 4 * 4 * 16 * seen


@pytest.mark.parametrize(
    ("score_dims", "score_dtype", "bytes_per_key"),
    [(0, "same", 16 * 4), (0, "float8", 16 * 4), (8, "same", 8 * 4), (8, "float8", 8)],
)
def test_a_step_reads_what_is_scored_of_each_key(settings, score_dims, score_dtype, bytes_per_key):
    changes = {"kernel_size": 1, "kernel_stride": 1, "pool_queries": True}
    attention = replace(
        settings.attention, score_dims=score_dims, score_dtype=score_dtype, **changes
    )
    step = work_of(
        "select_blocks", "decode", replace(settings, attention=attention), Heads(4, 2), 512
    )
    assert step.bytes == 2 * 512 * bytes_per_key
    assert step.flops == 2 * 2 * 512 * (score_dims or 16)


def test_the_memory_limit_is_three_times_the_tensors_and_half_a_gibibyte(settings):
    size = 2 * (4 + 2 + 2) * 1024 * 16 * 4 / 2**20
    assert tensors_mib(settings, Heads(4, 2), 1024) == size
    assert limit_mib(settings, Heads(4, 2), 1024) == 3 * size + 512
