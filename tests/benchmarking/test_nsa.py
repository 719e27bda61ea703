"""fla's attention as a baseline: its arguments, and how its times are shown.

fla needs a GPU; without one, a stand-in attends to the blocks that it is given.
"""

from __future__ import annotations

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from benchmarking.inputs import QKV, with_gradients
from benchmarking.nsa import nsa_attentions
from benchmarking.report import by_shape, fastest_dense, speed_table
from benchmarking.results import COLUMNS
from infllm_flex import InfLLMConfig, infllm_attention, reference, select_blocks
from tests.inputs import make_qkv, small_config
from tests.tolerance import assert_within_rounding

CONFIG = small_config()  # a budget of five blocks


def attend_to_given(q, k, v, *, block_indices=None, block_counts=16, block_size=64, **_):
    """Attend as fla does, ``[B, S, H, D]``: to the first ``block_counts`` of ``block_indices``."""
    G, slots = q.shape[2] // k.shape[2], 0 if block_indices is None else block_indices.shape[-1]
    assert G >= 16, "Group size (HQ/H) must be a power of 2 and >= 16 in NSA"
    assert slots & (slots - 1) == 0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if block_indices is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    used = torch.arange(slots) < block_counts[..., None]
    selected = block_indices.masked_fill(~used, -1).transpose(1, 2)
    mask = reference.attention_mask(selected, block_size, k.shape[2])
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.fixture
def calls(monkeypatch):
    """Replace fla, and return the arguments of its calls."""
    calls = []

    def parallel_nsa(*qkv, **options):
        calls.append(options)
        return attend_to_given(*qkv, **options)

    module = ModuleType("fla.ops.nsa.parallel")
    module.parallel_nsa, module.flash_attn_func = parallel_nsa, None
    package = ModuleType("fla")
    package.__spec__ = ModuleSpec("fla", None)
    for stand_in in (package, ModuleType("fla.ops"), ModuleType("fla.ops.nsa"), module):
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return calls


def test_without_fla_it_says_that_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    reasons = {"fla_nsa": "not installed: fla"}
    assert nsa_attentions(QKV(*make_qkv(64, Hq=32)), CONFIG) == ({}, reasons)


def test_given_our_choice_it_computes_what_we_compute(calls):
    qkv = with_gradients(QKV(*make_qkv(200, B=2, Hq=32)))
    grad_out = torch.randn_like(qkv.query)
    theirs = nsa_attentions(qkv, CONFIG)[0]["fla_nsa_given_5_blocks"]
    out = theirs.attend()
    expected = infllm_attention(*qkv, CONFIG)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    gradients = torch.autograd.grad(out, theirs.qkv, grad_out.transpose(1, 2))
    for mine, ours in zip(gradients, torch.autograd.grad(expected, qkv, grad_out), strict=True):
        torch.testing.assert_close(mine.transpose(1, 2), ours)
    assert calls[-1]["block_indices"].shape == (2, 200, 2, 8)
    assert calls[-1]["block_size"] == CONFIG.block_size


@pytest.mark.parametrize(("window", "name"), [(512, ""), (0, "_no_window")])
def test_its_own_settings_leave_the_window_out_where_flash_attn_is_missing(calls, window, name):
    sys.modules["fla.ops.nsa.parallel"].flash_attn_func = print if window else None
    serving, failing = nsa_attentions(QKV(*make_qkv(64, Hq=32)), CONFIG)
    assert list(serving) == [f"fla_nsa_16_blocks{name}", "fla_nsa_given_5_blocks"], failing
    serving[f"fla_nsa_16_blocks{name}"].attend()
    options = calls[-1]
    assert (options["block_counts"], options["block_size"]) == (16, 64)
    assert options["window_size"] == window
    assert all(options[gate].shape == (1, 64, 32) for gate in ("g_cmp", "g_slc", "g_swa"))


def test_an_fla_that_lacks_something_is_said(calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.nsa.parallel", None)
    serving, failing = nsa_attentions(QKV(*make_qkv(64, Hq=32)), CONFIG)
    assert serving == {}
    assert "fla.ops.nsa.parallel" in failing["fla_nsa"]


def test_why_it_does_not_serve_is_said(calls):
    serving, failing = nsa_attentions(QKV(*make_qkv(64, Hq=8)), CONFIG)
    assert serving == {}
    assert set(failing) == {"fla_nsa_16_blocks_no_window", "fla_nsa_given_5_blocks"}
    reason = "not supported: Group size (HQ/H) must be a power of 2 and >= 16 in NSA"
    assert set(failing.values()) == {reason}


def test_it_has_a_column_but_is_not_the_dense_attention_to_beat():
    shape = dict.fromkeys(COLUMNS, "") | {"S": "8", "Hq": "32", "Hkv": "2"}
    times = {
        ("nsa", "fla_nsa_16_blocks"): "1",
        ("infllm_attention", "auto"): "2",
        ("dense", "sdpa_flash"): "6",
    }
    rows = [shape | {"op": op, "variant": v, "ms_p50": ms} for (op, v), ms in times.items()]
    header, (line,) = speed_table(rows)
    assert header[-4:] == ["sdpa_flash", "x", "fla_nsa_16_blocks", "x"]
    assert line[-4:] == ["6", "3.00", "1", "0.50"]
    (measured,) = by_shape(rows).values()
    ours = next(method for method in measured if method.op == "infllm_attention")
    dense = fastest_dense(measured, ours)
    assert (dense.variant, measured[dense]) == ("sdpa_flash", 6.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # fla warns
def test_on_a_gpu_it_attends_to_the_blocks_that_we_choose():
    pytest.importorskip("fla.ops.nsa.parallel", exc_type=ImportError)
    config = dataclasses.replace(InfLLMConfig(), window_size=128, topk=6, dense_len=-1)
    qkv = QKV(*(x.cuda().bfloat16() for x in make_qkv(1024, Hq=32, D=128)))
    serving, failing = nsa_attentions(qkv, config)
    assert failing == {}
    selected = select_blocks(*qkv[:2], config)
    mask = reference.attention_mask(selected.cpu(), config.block_size, 1024).cuda()
    exact = reference.masked_attention(*qkv, mask, scale=128**-0.5)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        mask = mask.repeat_interleave(16, 1)
        plain = F.scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=True)
    out = serving["fla_nsa_given_8_blocks"].attend().transpose(1, 2)
    assert_within_rounding(out, exact, plain)
