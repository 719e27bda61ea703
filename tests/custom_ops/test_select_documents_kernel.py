"""The Triton kernels of ``select_blocks`` on padded and packed batches: as each sequence alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_flex_ops.selection.select_blocks import select_blocks
from tests.custom_ops.harness import (
    DTYPES,
    INTERPRETED,
    fenced,
    fenced_allocations,
    require_kernels,
    run_on_device,
)

require_kernels()
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy

from infllm_flex_ops.selection.kernels.prefill import plan  # noqa: E402
from tests.custom_ops.selection_launches import launch_select  # noqa: E402

# Windows of 8 every 4, blocks of 16, budgets of three or more: parts of 16 positions.
RULE = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "coarse_size": 32,
    "coarse_stride": 16,
    "block_size": 16,
    "init_blocks": 1,
    "local_blocks": 0,
    "num_selected": 7,
}
SCALE = 0.25


def _table(rows: list[list[tuple[int, int]]], part: int = 16) -> Tensor:
    """Lay documents of ``(length, budget)`` one after the other; a budget of 0 is padding."""
    tables = []
    for documents in rows:
        parts, first = [], 0
        for length, budget in documents:
            count = -(-length // part)
            parts += [[first, first + length, budget] if budget else [0, 0, 0]] * count
            first += count * part
        tables.append(parts)
    longest = max(map(len, tables))
    return torch.tensor(
        [parts + [[0, 0, 0]] * (longest - len(parts)) for parts in tables], dtype=torch.int32
    )


def _case(
    table: Tensor,
    group: int,
    Sq: int | None = None,
    dtype: torch.dtype = torch.float32,
    **rule: int,
) -> list[Any]:
    """Make arguments of small integers, so that scores that differ lie far apart."""
    rule = RULE | rule
    kv_len = table.shape[1] * 16
    random = torch.Generator().manual_seed(kv_len)
    B, Sq = table.shape[0], kv_len if Sq is None else Sq
    q, compressed, coarse = (
        torch.randint(-3, 4, (B, heads, rows, 16), generator=random).to(dtype)
        for heads, rows in (
            (group, Sq),
            (1, (kv_len - rule["kernel_size"]) // rule["kernel_stride"] + 1),
            (1, (kv_len - rule["coarse_size"]) // rule["coarse_stride"] + 1),
        )
    )
    return [q, compressed, coarse, kv_len, *rule.values(), SCALE, table]


PACKED = _table([[(20, 7), (70, 3), (1, 7), (52, 3)]])
PADDED = _table([[(20, 0), (60, 3)], [(40, 7), (30, 0)], [(20, 0)]])


def _judge(args: list[Any]) -> Tensor:
    actual, expected = run_on_device(launch_select, *args), select_blocks(*args)
    assert torch.equal(actual, expected)
    return actual


@pytest.mark.parametrize(
    ("args", "rule"),
    [
        ((PACKED, 2), {}),
        ((PADDED, 1), {}),
        ((PADDED, 3, 64), {}),  # the last queries
        ((PACKED, 5, 144), {"init_blocks": 0, "local_blocks": 1}),
        ((PACKED, 1), {"coarse_size": 8, "coarse_stride": 4}),  # exact normaliser
        ((PACKED, 1), {"kernel_size": 24, "coarse_size": 96}),  # windows wider than blocks
        ((_table([[(100, 3)]]), 1), {}),
    ],
)
def test_equals_the_definition(args: Any, rule: dict[str, int]) -> None:
    _judge(_case(*args, **rule))


@pytest.mark.parametrize("group", [1, 16])
def test_equals_the_definition_in_half_precision(group: int) -> None:
    """With one head, a tile has more tokens than a part has positions."""
    _judge(_case(PACKED, group, dtype=torch.float16))


def test_long_documents_are_selected_from_a_few_segments() -> None:
    table = _table([[(20, 3), (1600, 3), (40, 2)]])
    _judge(_case(table, 16, 80, torch.float16, num_selected=3))


def test_nan_of_another_document_or_of_padding_changes_nothing() -> None:
    args = _case(PACKED, 2)
    expected = select_blocks(*args)
    args[0][:, :, :32] = torch.nan
    args[1][:, :, :8] = torch.nan
    args[2][:, :, :2] = torch.nan
    assert torch.equal(run_on_device(launch_select, *args)[:, :, 32:], expected[:, :, 32:])


def test_a_document_is_the_same_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = DTYPES[-1]
    random = torch.Generator().manual_seed(0)
    args = [
        torch.randn(x.shape, generator=random).to(dtype) if torch.is_tensor(x) and i < 3 else x
        for i, x in enumerate(_case(PACKED, 2, dtype=dtype))
    ]
    together = run_on_device(launch_select, *args)
    for first, end, budget in {tuple(part) for part in PACKED[0].tolist()}:
        length = end - first
        keys = [
            x[:, :, first // stride :][:, :, : max(0, (length - size) // stride + 1)]
            for x, size, stride in ((args[1], 8, 4), (args[2], 32, 16))
        ]
        rule = [*(RULE | {"num_selected": budget}).values(), SCALE]
        alone = run_on_device(launch_select, args[0][:, :, first:end], *keys, length, *rule)
        ours = together[:, :, first:end]
        ours = torch.where(ours < 0, -1, ours - first // 16)
        assert torch.equal(ours[..., : alone.shape[-1]], alone)
        assert (ours[..., alone.shape[-1] :] == -1).all()
    for limit in (1, 4000):
        monkeypatch.setattr(plan, "SCORE_BYTES", limit)
        monkeypatch.setattr(plan, "LSE_BYTES", limit)
        assert torch.equal(run_on_device(launch_select, *args), together)


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
def test_touches_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    args = _case(PADDED, 1, 64, dtype=torch.float16)
    expected = select_blocks(*args)
    guarded = [fenced(x) if torch.is_tensor(x) else x for x in args]
    with fenced_allocations(monkeypatch):
        actual = launch_select(*guarded)
    assert torch.equal(actual, expected)


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
@pytest.mark.parametrize("wrong", [2**31 - 1, 5000, -1, -(2**31)])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_wrong_table_reads_and_writes_nothing_outside(
    column: int, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = _case(PADDED, 1, 64, dtype=torch.float16)
    args[-1] = args[-1].clone()
    args[-1][1, :, column] = wrong
    guarded = [fenced(x) if torch.is_tensor(x) else x for x in args]
    with fenced_allocations(monkeypatch):
        actual = launch_select(*guarded)
    expected = select_blocks(*_case(PADDED, 1, 64, dtype=torch.float16))
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
