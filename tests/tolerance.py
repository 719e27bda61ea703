"""The numeric assertions of the tests."""

import torch
from torch import Tensor


def assert_within_rounding(
    actual: Tensor, exact: Tensor, same_precision: Tensor, *, factor: float = 2.0
) -> None:
    """Allow ``factor`` times the error of plain operations in the same precision plus a rounding.

    Args:
        actual: The result under test.
        exact: The result in float64.
        same_precision: The result of plain operations in the precision of ``actual``.
        factor: 2 for outputs, 3 for gradients.
    """
    assert actual.shape == exact.shape
    assert torch.equal(actual.isnan(), exact.isnan())
    error = (actual.double() - exact).abs().max()
    plain_error = (same_precision.double() - exact).abs().max()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= factor * plain_error + factor * rounding, (
        f"error {error:.3g} exceeds {factor} x {plain_error:.3g} + {factor} x {rounding:.3g}"
    )
