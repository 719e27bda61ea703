"""A sequence gives the same result alone, padded on either side, or packed behind others."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from infllm_flex import infllm_attention, reference, select_blocks
from tests.batches import (
    CONFIGS,
    attend_alone,
    attend_exactly,
    packed,
    padded,
    qkv_for,
    select_alone,
)
from tests.inputs import make_qkv, small_config
from tests.tolerance import assert_within_rounding

batches = st.one_of(
    st.fixed_dictionaries({"cu_seqlens": packed()}),
    st.fixed_dictionaries({"attention_mask": padded()}),
)
some = settings(max_examples=40, deadline=None)
few = settings(max_examples=15, deadline=None)


@some
@given(batches, st.sampled_from(CONFIGS))
def test_the_choice_is_that_of_the_sequence_alone(batch, config):
    q, k, _ = qkv_for(batch, Hq=4, Hkv=2, D=8)
    selected = select_blocks(q, k, config, **batch)
    assert torch.equal(selected, select_alone(q, k, config, **batch))


@some
@given(padded(), st.sampled_from(CONFIGS), st.data())
def test_the_choice_of_the_last_queries_is_that_of_the_sequence_alone(mask, config, data):
    q, k, _ = qkv_for({"attention_mask": mask}, Hq=3, Hkv=1, D=8)
    q = q[:, :, data.draw(st.integers(0, k.shape[2] - 1)) :]
    selected = select_blocks(q, k, config, attention_mask=mask)
    assert torch.equal(selected, select_alone(q, k, config, attention_mask=mask))


def run(attend, qkv, config, dtype, grad_out, **batch):
    """Output and gradients, in one list."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
    out = attend(*leaves, config, **batch)
    if out.requires_grad:  # a batch of padding alone does not
        out.backward(grad_out.to(out.dtype))
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


@few
@given(batches, st.sampled_from(CONFIGS), st.data())
def test_outputs_and_gradients_are_those_of_the_sequence_alone(batch, config, data):
    qkv = qkv_for(batch, Hq=4, Hkv=2, D=8)
    if "attention_mask" in batch:
        qkv = (qkv[0][:, :, data.draw(st.integers(0, qkv[1].shape[2] - 1)) :], *qkv[1:])
    grad_out = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1))
    ours = run(infllm_attention, qkv, config, torch.float32, grad_out, **batch)
    alone = run(attend_alone, qkv, config, torch.float32, grad_out, **batch)
    exact = run(attend_exactly, qkv, config, torch.float64, grad_out, **batch)
    # Judged together, since some are zero: a token that sees only itself gives its query none.
    together = [torch.cat([x.flatten() for x in tensors]) for tensors in (ours, exact, alone)]
    assert_within_rounding(*together, factor=3)


BOUNDS = torch.tensor([0, 130, 130, 131, 190, 330, 330], dtype=torch.int32)
MASK = torch.zeros(4, 205, dtype=torch.bool)
MASK[0, 50:205] = True  # on the left
MASK[1, :131] = True  # on the right
MASK[2, 37:100] = True  # on both sides, and short
CONFIG = CONFIGS[1]
BATCHES = pytest.mark.parametrize("batch", [{"cu_seqlens": BOUNDS}, {"attention_mask": MASK}])


@BATCHES
@pytest.mark.parametrize("dense_by", ["sequence", "position"])
def test_the_reference_says_the_same(batch, dense_by):
    # Half the lengths and one head, since the reference is slow.
    batch = {name: x[..., ::2] if name == "attention_mask" else x // 2 for name, x in batch.items()}
    config = small_config(window_size=16, topk=3, dense_len=68, engine="fused", dense_by=dense_by)
    qkv = qkv_for(batch, Hq=1, Hkv=1)
    out = infllm_attention(*qkv, config, **batch)
    exact = reference.batch_attention(*qkv, config, **batch)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6)
    assert not torch.allclose(out, infllm_attention(*qkv, config), atol=1e-2)


@pytest.mark.parametrize("fill", [1.0, torch.nan])
@pytest.mark.parametrize("config", [CONFIG, CONFIGS[3], CONFIGS[5], small_config(dense_len=1000)])
def test_editing_another_document_changes_no_bit(config, fill):
    if config.is_dense(330) and fill != fill:
        pytest.skip("SDPA multiplies masked values by zero, and 0 x nan is nan")
    qkv = qkv_for({"cu_seqlens": BOUNDS}, Hq=6)
    grad_out = torch.randn_like(qkv[0])
    edited = [x.clone() for x in (*qkv, grad_out)]
    for x in edited:
        x[:, :, :131] = torch.randn_like(x[:, :, :131]) * 3
        x[:, :, 190:] = fill
    runs = [
        run(infllm_attention, inputs[:3], config, torch.float32, inputs[3], cu_seqlens=BOUNDS)
        for inputs in ((*qkv, grad_out), edited)
    ]
    for before, after in zip(*runs, strict=True):
        assert torch.equal(after[:, :, 131:190], before[:, :, 131:190])
        assert not torch.equal(after[:, :, 190:], before[:, :, 190:])


@pytest.mark.parametrize("config", [CONFIG, small_config(dense_len=1000)])
def test_nan_in_padding_never_spreads(config):
    qkv = qkv_for({"attention_mask": MASK})
    grad_out = torch.randn_like(qkv[0])
    padding = ~MASK[:, None, :, None]
    poisoned = [x.masked_fill(padding, torch.nan) for x in (*qkv, grad_out)]
    runs = [
        run(infllm_attention, inputs[:3], config, torch.float32, inputs[3], attention_mask=MASK)
        for inputs in ((*qkv, grad_out), poisoned)
    ]
    for before, after in zip(*runs, strict=True):
        assert torch.equal(after, before)
        assert (after.masked_select(padding) == 0).all()
    chosen = [select_blocks(*x[:2], config, attention_mask=MASK) for x in (qkv, poisoned)]
    assert torch.equal(*chosen)


def test_below_dense_len_a_padded_batch_is_masked_sdpa_bit_for_bit():
    q, k, v = qkv_for({"attention_mask": MASK}, Hq=2)
    out = infllm_attention(q, k, v, small_config(dense_len=206), attention_mask=MASK)
    causal = torch.ones(205, 205, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=causal & MASK[:, None, None])
    assert torch.equal(out, expected.masked_fill(~MASK[:, None, :, None], 0.0))


@BATCHES
def test_a_choice_made_beforehand_is_used(batch):
    q, k, v = qkv_for(batch)
    config = small_config(window_size=16, topk=3, dense_len=100, engine="fused")
    chosen = select_blocks(q, k, config, **batch)
    out = infllm_attention(q, k, v, config, **batch)
    assert torch.equal(infllm_attention(q, k, v, config, **batch, selected=chosen), out)
    other = select_blocks(*qkv_for(batch, seed=5)[:2], config, **batch)
    assert not torch.equal(infllm_attention(q, k, v, config, **batch, selected=other), out)


@pytest.mark.parametrize("engine", ["flex", "fused"])
def test_every_engine_serves_batches(engine):
    config = small_config(window_size=16, topk=3, dense_len=100, engine=engine)
    qkv = qkv_for({"attention_mask": MASK}, Hq=8)
    out = infllm_attention(*qkv, config, attention_mask=MASK)
    exact = attend_exactly(*(x.double() for x in qkv), config, attention_mask=MASK)
    alone = attend_alone(
        *qkv, small_config(**{**vars(config), "engine": "fused"}), attention_mask=MASK
    )
    assert_within_rounding(out, exact, alone)


@BATCHES
@pytest.mark.parametrize("dense_len", [100, 1000])
def test_trains_as_one_graph(batch, dense_len):
    config = small_config(window_size=16, topk=3, dense_len=dense_len)
    qkv = qkv_for(batch)
    grad_out = torch.randn_like(qkv[0])
    compiled = torch.compile(infllm_attention, fullgraph=True, backend="aot_eager")
    expected = run(infllm_attention, qkv, config, torch.float32, grad_out, **batch)
    ours = run(compiled, qkv, config, torch.float32, grad_out, **batch)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("is_packed", [False, True])
def test_many_lengths_compile_few_graphs(is_packed):
    config = small_config(window_size=16, topk=3, dense_len=60)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(infllm_attention, fullgraph=True, backend=counter)
    for S in range(100, 200, 20):
        qkv = [x.requires_grad_() for x in make_qkv(S)]
        bounds = torch.tensor([0, *range(S % 30 + 1, S, 30), S])
        batch = {"cu_seqlens": bounds} if is_packed else {"attention_mask": torch.ones(1, S).bool()}
        out = compiled(*qkv, config, **batch)
        assert torch.equal(out, infllm_attention(*qkv, config, **batch))
    assert counter.frame_count <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@BATCHES
def test_on_a_gpu_nothing_waits_for_the_device(batch):
    batch = {name: x.cuda() for name, x in batch.items()}
    qkv = [x.cuda() for x in qkv_for({name: x.cpu() for name, x in batch.items()})]
    grad_out = torch.randn_like(qkv[0])
    ours = run(infllm_attention, qkv, CONFIG, torch.float32, grad_out, **batch)  # compiles kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(infllm_attention, qkv, CONFIG, torch.float32, grad_out, **batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = [x.cpu() for x in qkv]
    batch = {name: x.cpu() for name, x in batch.items()}
    expected = run(infllm_attention, on_cpu, CONFIG, torch.float32, grad_out.cpu(), **batch)
    for x, y, z in zip(ours, again, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
        torch.testing.assert_close(x.cpu(), z, rtol=0, atol=1e-4)


def test_through_inductor_bad_values_are_asserted():
    config = small_config(window_size=16, topk=3)
    q, k, v = make_qkv(100)
    compiled = torch.compile(
        lambda q, k, v, bounds: infllm_attention(q, k, v, config, cu_seqlens=bounds), fullgraph=True
    )
    bounds = torch.tensor([0, 30, 100], dtype=torch.int32)
    expected = infllm_attention(q, k, v, config, cu_seqlens=bounds)
    torch.testing.assert_close(compiled(q, k, v, bounds), expected, rtol=0, atol=2e-6)
    with pytest.raises(RuntimeError, match="cu_seqlens must ascend from 0 to the length of key"):
        compiled(q, k, v, torch.tensor([0, 30, 99], dtype=torch.int32))


GOOD = make_qkv(64, B=2)
ONE = make_qkv(64)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def with_gap(hole):
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, hole] = 0
    return mask


@pytest.mark.parametrize(
    ("qkv", "batch", "message"),
    [
        (GOOD, {"attention_mask": with_gap(30)}, "in one run per row, .* not so in row 1"),
        (GOOD, {"attention_mask": with_gap(0) * 2}, "must hold ones for real tokens"),
        (GOOD, {"attention_mask": with_gap(0).float()}, "bool or integer, got torch.float32"),
        (GOOD, {"attention_mask": with_gap(0)[:, 1:]}, r"\[B, Skv\] = \[2, 64\], got \[2, 63\]"),
        (GOOD, {"attention_mask": with_gap(0).to("meta")}, "on the device of key, cpu, got meta"),
        (GOOD, {"cu_seqlens": ints(0, 64)}, "one row, got a batch of 2"),
        (ONE, {"cu_seqlens": ints(0, 63)}, "ascend from 0 to the length of key"),
        (ONE, {"cu_seqlens": ints(1, 64)}, "ascend from 0 to the length of key"),
        (ONE, {"cu_seqlens": ints(0, 40, 30, 64)}, "ascend from 0 to the length of key"),
        (ONE, {"cu_seqlens": ints(64)}, r"must be \[N \+ 1\] .* got shape \[1\]"),
        (ONE, {"cu_seqlens": ints(0, 64).float()}, "must be int32, got torch.float32"),
        ((ONE[0][:, :, 1:], *ONE[1:]), {"cu_seqlens": ints(0, 64)}, "as long as key, got 63"),
        (ONE, {"cu_seqlens": ints(0, 64), "attention_mask": with_gap(0)[:1]}, "give one of them"),
    ],
)
def test_bad_input_is_named_in_one_line(qkv, batch, message):
    for call in (
        lambda: infllm_attention(*qkv, CONFIG, **batch),
        lambda: select_blocks(*qkv[:2], CONFIG, **batch),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
