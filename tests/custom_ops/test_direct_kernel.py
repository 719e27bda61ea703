"""A decode step that launches kernels past the dispatcher computes what its operators compute."""

import pytest
import torch

import infllm_flex as ifx
from infllm_flex_ops import dispatch
from infllm_flex_ops.sizes import next_power_of_2
from tests.custom_ops.harness import DEVICE, require_kernels
from tests.inputs import make_qkv, small_config

require_kernels()
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy

import triton  # noqa: E402


@pytest.mark.parametrize("settings", [{}, {"pool_queries": True, "kernel_size": 1}], ids=str)
def test_a_step_past_the_dispatcher(monkeypatch, settings):
    if settings:
        settings = {**settings, "kernel_stride": 1}
    config = small_config(**settings)
    q, k, v = (x.to(DEVICE) for x in make_qkv(240, B=2, dtype=torch.float32))
    start = torch.tensor([0, 9], device=DEVICE)

    def step():
        keys = ifx.CompressedKeys(config, k)
        keys.append(k, 238, start=start)
        keys.append(k, 2, start=start)
        return ifx.decode_attention(q[:, :, -2:], k, v, keys), keys

    expected, theirs = step()
    launched = []

    def direct(op, device):
        launched.append(op.plain.__name__)
        return op.on_cuda

    monkeypatch.setattr(dispatch, "direct_kernel", direct)
    with torch.no_grad():
        out, ours = step()
    assert len(launched) == (2 if settings else 4)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for name in ("compressed", "coarse", "start", "end"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_powers_of_two_are_those_of_triton():
    assert all(next_power_of_2(n) == triton.next_power_of_2(n) for n in range(1, 2000))
