"""The Triton kernel of ``compress_keys`` equals its definition, to the bit where rounding is."""

import pytest
import torch

from infllm_flex_ops.selection.compress_keys import compress_keys
from tests.custom_ops.harness import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    far_apart,
    fenced,
    fenced_allocations,
    require_kernels,
    run_on_device,
)

require_kernels()

from infllm_flex_ops.selection.kernels.compress_keys import launch  # noqa: E402


def _keys(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "kernel_size", "kernel_stride"),
    [
        ((1, 2, 130, 40), 32, 16),
        ((2, 1, 300, 128), 128, 64),
        ((1, 1, 1, 16), 32, 16),
        ((1, 3, 31, 16), 32, 16),
        ((1, 3, 32, 16), 32, 16),
        ((1, 1, 97, 80), 36, 12),
        ((1, 1, 40, 24), 7, 7),
        ((1, 1, 30, 256), 5, 1),
    ],
)
def test_equals_the_definition_bit_for_bit(
    shape: tuple[int, ...], kernel_size: int, kernel_stride: int, dtype: torch.dtype
) -> None:
    k = _keys(*shape, dtype=dtype)
    expected = compress_keys(k, kernel_size, kernel_stride)
    actual = run_on_device(launch, k, kernel_size, kernel_stride)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


def test_takes_any_strides() -> None:
    k = _keys(2, 100, 3, 2 * 40).transpose(1, 2)[..., ::2]
    assert torch.equal(run_on_device(launch, k, 32, 16), compress_keys(k.contiguous(), 32, 16))


def test_window_bits_depend_on_its_keys_alone() -> None:
    k = _keys(2, 2, 400, 48)
    whole = run_on_device(launch, k, 32, 16)
    for first, last in ((0, 48), (5, 9), (22, 23)):  # windows, each at another place in the grid
        part = run_on_device(launch, k[1:, :, first * 16 : (last - 1) * 16 + 32], 32, 16)
        assert torch.equal(part, whole[1:, :, first:last])


def test_nan_stays_in_its_windows() -> None:
    k = _keys(1, 1, 128, 16)
    k[:, :, 50, 3] = torch.nan
    hit = run_on_device(launch, k, 32, 16).isnan()
    assert hit[0, 0, :, 3].nonzero().flatten().tolist() == [2, 3]
    assert hit.sum() == 2


def test_reads_offsets_beyond_32_bits() -> None:
    k = _keys(2, 2, 70, 16, dtype=torch.float16)
    expected = compress_keys(k, 32, 16)
    for dim in (0, 1, 2):
        assert torch.equal(launch(far_apart(k, dim), 32, 16).cpu(), expected)


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
def test_touches_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((1, 1, 77, 40), (2, 3, 47, 24)):
        k = _keys(*shape)
        with fenced_allocations(monkeypatch):
            actual = launch(fenced(k), 32, 16)
        assert torch.equal(actual, compress_keys(k, 32, 16))


@pytest.mark.skipif(INTERPRETED, reason="too many programs for the interpreter")
def test_more_heads_than_a_grid_axis_holds() -> None:
    k = torch.randn(70_000, 1, 32, 16, device=DEVICE)
    assert torch.equal(launch(k, 32, 16).cpu(), compress_keys(k.cpu(), 32, 16))
