"""Dense by position: what a query sees, and so its output, depends on nothing that follows it."""

import pytest
import torch

from infllm_flex import (
    CompressedKeys,
    decode_attention,
    infllm_attention,
    reference,
    select_blocks,
)
from infllm_flex.chunks import attend_chunk
from tests.batches import attend_exactly
from tests.inputs import make_qkv, small_config
from tests.tolerance import assert_within_rounding

BUDGET = 80  # five blocks of 16
BY_POSITION = small_config(dense_len=120, dense_by="position", engine="fused")
BY_SEQUENCE = small_config(dense_len=120, engine="fused")
OTHER_SCORING = [
    {"lse": "exact"},
    {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1},
    {"init_blocks": 0, "window_size": 0, "topk": 2},
]


def upto(end, qkv, begin=0):
    """Queries from ``begin`` to ``end``, and the keys and values that they may see."""
    q, k, v = qkv
    return q[:, :, begin:end], k[:, :, :end], v[:, :, :end]


def in_parts(attend, qkv, config, sizes):
    """The output of a sequence that comes in parts of these sizes, cyclically."""
    length, out, begin = qkv[1].shape[2], [], 0
    while begin < length:
        end = min(length, begin + sizes[len(out) % len(sizes)])
        out.append(attend(*upto(end, qkv, begin), config))
        begin = end
    return torch.cat(out, 2)


def test_the_reference_depends_on_the_prefix_alone_by_position_but_not_by_sequence():
    qkv = make_qkv(131, Hq=2, Hkv=1)
    whole = reference.attention(*qkv, BY_POSITION)
    for end in (1, 79, 80, 81, 118, 119, 120, 121, 130):
        alone = reference.attention(*upto(end, qkv), BY_POSITION)
        torch.testing.assert_close(alone, whole[:, :, :end], rtol=0, atol=1e-13)
    whole = reference.attention(*qkv, BY_SEQUENCE)
    short, long = (reference.attention(*upto(n, qkv), BY_SEQUENCE) for n in (119, 120))
    assert (short - whole[:, :, :119]).abs().amax() > 1e-2
    torch.testing.assert_close(long, whole[:, :, :120], rtol=0, atol=1e-13)


@pytest.mark.parametrize("sizes", [(1,), (131,), (119, 1), (120,), (100, 13, 7)], ids=str)
def test_in_the_reference_whole_equals_any_chunks(sizes):
    qkv = make_qkv(131, Hq=2, Hkv=1)
    whole = reference.attention(*qkv, BY_POSITION)
    parts = in_parts(reference.attention, qkv, BY_POSITION, sizes)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)


def test_each_query_of_the_reference_is_by_sequence_the_last_of_its_own():
    """The last query of a sequence is dense by position iff the sequence is dense."""
    qkv = make_qkv(131, Hq=2, Hkv=1)
    parts = in_parts(reference.attention, qkv, BY_SEQUENCE, (1,))
    whole = reference.attention(*qkv, BY_POSITION)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)


SHAPES = [
    pytest.param({"S": 205, "B": 2, "Hq": 8}, id="groups_of_4"),
    pytest.param({"S": 205, "Sq": 130, "Hq": 3, "Hkv": 3, "D": 40}, id="from_position_75"),
    pytest.param({"S": 205, "Sq": 87, "Hq": 7, "Hkv": 1, "D": 24}, id="one_dense_query"),
    pytest.param({"S": 205, "Sq": 86, "Hq": 2, "Hkv": 1}, id="no_dense_query"),
    pytest.param({"S": 120}, id="one_sparse_query"),
]


def run(attend, dtype, shape, config):
    """Output and gradients of the same float32 inputs in another precision."""
    leaves = [x.to(dtype).requires_grad_() for x in make_qkv(**shape)]
    out = attend(*leaves, config)
    out.backward(make_qkv(**shape, seed=1)[0].to(dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def attend_plainly(q, k, v, config):
    """Masked softmax in the precision of the inputs."""
    chosen = select_blocks(q.float(), k.float(), config)
    mask = reference.switched_mask(chosen, config, k.shape[2])
    k, v, mask = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v, mask))
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_reference(shape):
    results = (
        run(attend, dtype, shape, BY_POSITION)
        for attend, dtype in (
            (infllm_attention, torch.float32),
            (attend_exactly, torch.float64),
            (attend_plainly, torch.float32),
        )
    )
    for actual, exact, plain in zip(*results, strict=True):
        assert_within_rounding(actual, exact, plain, factor=3)


@pytest.mark.parametrize("changes", OTHER_SCORING, ids=str)
def test_whatever_scores_the_blocks(changes):
    config = small_config(dense_len=120, dense_by="position", engine="fused", **changes)
    qkv = make_qkv(150, Hq=2, Hkv=1)
    out = infllm_attention(*qkv, config)
    exact = reference.attention(*qkv, config)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6)


def test_flexattention_gives_the_same():
    config = small_config(dense_len=120, dense_by="position", engine="flex")
    qkv = make_qkv(205, Hq=8)
    assert_within_rounding(
        infllm_attention(*qkv, config),
        attend_exactly(*qkv, config),
        attend_plainly(*qkv, config),
    )


@pytest.mark.parametrize("sizes", [(1,), (119, 1), (40, 101)], ids=str)
def test_whole_equals_chunks_equals_token_by_token(sizes):
    qkv = make_qkv(150)
    whole = infllm_attention(*qkv, BY_POSITION)
    for attend in (infllm_attention, attend_chunk):
        parts = in_parts(attend, qkv, BY_POSITION, sizes)
        torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sizes", [(1,), (7, 3)], ids=str)
def test_a_decode_step_equals_the_whole(sizes):
    qkv = make_qkv(150)
    state = CompressedKeys(BY_POSITION, qkv[1])

    def step(q, k, v, config):
        state.append(k, q.shape[2])
        return decode_attention(q, k, v, state)

    whole = infllm_attention(*qkv, BY_POSITION)
    parts = in_parts(step, qkv, BY_POSITION, sizes)
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("batch", ["alone", "packed", "padded"])
@pytest.mark.parametrize("dense_len", [-1, 0, 1, 50, BUDGET, BUDGET + 1])
def test_within_the_budget_both_rules_are_one_function_bit_for_bit(dense_len, batch):
    mask = torch.arange(150)[None] >= 13
    batches = {
        "alone": {},
        "packed": {"cu_seqlens": torch.tensor([0, 20, 150], dtype=torch.int32)},
        "padded": {"attention_mask": mask},
    }
    out = [
        infllm_attention(
            *make_qkv(150),
            small_config(dense_len=dense_len, dense_by=dense_by, engine="fused"),
            **batches[batch],
        )
        for dense_by in ("sequence", "position")
    ]
    assert torch.equal(*out)


def test_beyond_the_budget_they_differ_at_the_positions_in_between():
    out = [
        infllm_attention(*make_qkv(150), small_config(dense_len=100, dense_by=dense_by))
        for dense_by in ("sequence", "position")
    ]
    differs = ((out[0] - out[1]).abs() > 1e-5).any(-1).any(1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(BUDGET, 99))


@pytest.mark.parametrize("dense_len", [50, 120])
def test_a_choice_made_beforehand_holds_for_sparse_queries_only(dense_len):
    config = small_config(dense_len=dense_len, dense_by="position", engine="fused")
    q, k, v = make_qkv(150)
    nearest = small_config(window_size=0, topk=2, init_blocks=0)  # fewer blocks than the budget
    selected = select_blocks(q, k, nearest)
    mask = reference.switched_mask(selected, config, 150)
    exact = reference.masked_attention(q, k, v, mask, scale=0.25)
    everything = torch.ones(1, 150, dtype=torch.bool)
    for batch in ({}, {"attention_mask": everything}):
        out = infllm_attention(q, k, v, config, selected=selected, **batch)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_to_one_graph_and_few_for_many_lengths(training):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: infllm_attention(q, k, v, BY_POSITION), fullgraph=True, backend=counter
    )
    for S in (100, 119, 120, 121, 130, 205, 300):
        qkv = [x.requires_grad_(training) for x in make_qkv(S)]
        expected = infllm_attention(*qkv, BY_POSITION)
        torch.testing.assert_close(compiled(*qkv), expected, rtol=0, atol=2e-6)
    assert counter.frame_count <= 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the kernels of a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu_too(shape):
    def on_gpu(q, k, v, config):
        return infllm_attention(*(x.cuda() for x in (q, k, v)), config).cpu()

    results = (
        run(attend, dtype, shape, BY_POSITION)
        for attend, dtype in (
            (on_gpu, torch.float32),
            (attend_exactly, torch.float64),
            (attend_plainly, torch.float32),
        )
    )
    for actual, exact, plain in zip(*results, strict=True):
        assert_within_rounding(actual, exact, plain, factor=3)
