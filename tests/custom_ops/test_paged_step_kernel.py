"""The kernels of a decode step over pages do what its definition does, in rows of every kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_flex.decoding.attention import list_width
from infllm_flex_ops import attend_paged_blocks, paged_step, select_paged_blocks
from tests.custom_ops.harness import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    fenced,
    fenced_allocations,
    require_kernels,
)
from tests.inputs import make_qkv, small_config
from tests.paged import draw_rows, query_start
from tests.tolerance import assert_within_rounding

require_kernels()
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy

from infllm_flex_ops.block_attention.kernels import decode_step as kernels  # noqa: E402

# A row of padding, a row that only holds a prompt, and one whose five queries are left out.
LENGTHS = [230, 0, 64, 231, 230, 17]
COUNTS = [1, 0, 1, 0, 5, 1]
SETTINGS: list[dict[str, Any]] = [
    {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "window_size": 64, "topk": 2},
    {},
    {"lse": "exact", "init_blocks": 0, "dense_len": 100},
    {"kernel_size": 12, "topk": 2, "window_size": 16, "dense_len": 231},
    {"topk": 60},  # every list holds all blocks
]


def step_args(
    page_size: int, *, G: int = 2, D: int = 16, dtype: torch.dtype = torch.float32, **settings: Any
) -> list[Any]:
    """Arguments of a step of ``LENGTHS``; two queries at the end belong to no row."""
    config = small_config(**settings)
    rows = draw_rows(config, LENGTHS, page_size, D=D, dtype=dtype, whole_numbers=True)
    rows.cache.append(rows.batch(LENGTHS))
    cache = rows.cache
    q = (3 * make_qkv(sum(COUNTS) + 2, Hq=2 * G, D=D, dtype=dtype)[0]).round()[0].transpose(0, 1)
    windows = cache.compressed, cache.compressed if cache.coarse is None else cache.coarse
    where = rows.block_table, rows.seq_lens, query_start(COUNTS)
    width = list_width(config, rows.block_table.shape[1] * page_size)
    rest = config.dense_len, width, 4 / D
    return [q, cache.key, cache.value, *windows, *where, *cache.rule, *rest]


def served(out: Tensor) -> Tensor:
    """The queries of rows that have one."""
    first = query_start(COUNTS).tolist()
    return out[[first[row] for row, count in enumerate(COUNTS) if count == 1]]


def launch(args: list[Any]) -> Tensor:
    return paged_step.launcher()(*paged_step.pack(*args))


def judge(args: list[Any]) -> Tensor:
    """Compare the output with that of the definitions in float64, by the definition's choice."""
    out = launch([x.to(DEVICE) if isinstance(x, Tensor) else x for x in args]).cpu()
    q, k, v, *others = args
    selected = select_paged_blocks(q, *others[:-1], 1, others[-1])
    rest = selected, *others[2:5], others[9], 1, others[-1]
    exact = attend_paged_blocks(q.double(), k.double(), v.double(), *rest)
    plain = attend_paged_blocks(q, k, v, *rest)
    assert_within_rounding(served(out), served(exact), served(plain))
    return served(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("settings", "page_size", "G", "D"),
    [
        (SETTINGS[0], 16, 16, 64),  # a block of four pages
        (SETTINGS[0], 64, 4, 128),
        (SETTINGS[1], 128, 1, 40),
        (SETTINGS[2], 16, 7, 24),
        (SETTINGS[3], 64, 1, 128),
        (SETTINGS[4], 32, 2, 16),
    ],
    ids=str,
)
def test_a_step_selects_and_attends(
    settings: dict[str, Any], page_size: int, G: int, D: int, dtype: torch.dtype
) -> None:
    judge(step_args(page_size, G=G, D=D, dtype=dtype, **settings))


@pytest.mark.parametrize(
    "sizes", [{"_PROGRAMS": 1}, {"_MAX_SPLITS": 128, "_JOINING_PROGRAMS": 10_000, "_MIN_PART": 16}]
)
def test_any_number_of_programs_joins(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in sizes.items():
        monkeypatch.setattr(kernels, name, size)
    judge(step_args(16, D=40))


def test_a_step_repeats_its_bits() -> None:
    first, second = (judge(step_args(16)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
def test_touches_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    args = step_args(16, D=24)
    expected = served(paged_step(*args))
    guarded = [fenced(x) if isinstance(x, Tensor) else x for x in args]
    with fenced_allocations(monkeypatch):
        out = launch(guarded)
    torch.testing.assert_close(served(out), expected)
