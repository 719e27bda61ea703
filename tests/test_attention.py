import warnings

import pytest
import torch
import torch.nn.functional as F

from infllm_flex import InfLLMConfig, infllm_attention, reference, select_blocks
from infllm_flex.engines import flex_compiled
from infllm_flex.engines.flex import can_train
from tests.inputs import make_qkv, small_config
from tests.tolerance import assert_within_rounding
from tests.watch import WatchTensors

DENSE = small_config(dense_len=10_000)


def attend_plainly(q, k, v, config):
    """Masked softmax in the inputs' precision, with the operator's own selection."""
    groups = q.shape[1] // k.shape[1]
    selected = select_blocks(q, k, config)
    mask = reference.attention_mask(selected, config.block_size, k.shape[2])
    k, v, mask = (x.repeat_interleave(groups, 1) for x in (k, v, mask))
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def attend_exactly(q, k, v, config):
    selected = select_blocks(q, k, config)
    mask = reference.attention_mask(selected, config.block_size, k.shape[2])
    return reference.masked_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)


# Each shape compiles FlexAttention once, for some seconds: they are few, and differ.
FLEX_SHAPES = [
    pytest.param({"S": 205, "B": 2, "Hq": 8, "Hkv": 2}, torch.float32, id="ragged"),
    pytest.param(
        {"S": 205, "Sq": 30, "Hq": 3, "Hkv": 3, "D": 40}, torch.float32, id="last_queries"
    ),
    pytest.param({"S": 150, "Hq": 7, "Hkv": 1, "D": 24}, torch.bfloat16, id="bfloat16"),
]


@pytest.mark.parametrize(("shape", "dtype"), FLEX_SHAPES)
@pytest.mark.parametrize("engine", ["flex", "fused"])
def test_every_engine_gives_masked_attention(engine, shape, dtype):
    config = small_config(engine=engine)
    qkv = make_qkv(**shape, dtype=dtype)
    out = infllm_attention(*qkv, config)
    assert out.dtype == dtype
    assert_within_rounding(out, attend_exactly(*qkv, config), attend_plainly(*qkv, config))


def test_training_gives_the_gradients_of_masked_attention():
    config = small_config()
    grad_out = make_qkv(205, seed=1)[0]

    def run(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in make_qkv(205)]
        out = attend(*leaves, config)
        out.backward(grad_out.to(dtype))
        return [out.detach(), *(x.grad for x in leaves)]

    ours = run(infllm_attention, torch.float32)
    plain = run(attend_plainly, torch.float32)
    # Blocks are selected in float32 in both cases, so that only the arithmetic is compared.
    chosen = select_blocks(*make_qkv(205)[:2], config)

    def exact(q, k, v, config):
        mask = reference.attention_mask(chosen, config.block_size, 205)
        return reference.masked_attention(q, k, v, mask, scale=0.25)

    for actual, true, same in zip(ours, run(exact, torch.float64), plain, strict=True):
        assert_within_rounding(actual, true, same, factor=3)


@pytest.mark.parametrize("engine", ["flex", "fused"])
def test_with_every_block_selected_sparse_equals_dense(engine):
    everything = small_config(topk=20, engine=engine)
    qkv = make_qkv(205, Hq=8)
    exact = reference.attention(*qkv, DENSE)
    dense = infllm_attention(*qkv, DENSE)
    assert_within_rounding(infllm_attention(*qkv, everything), exact, dense, factor=3)


def test_with_every_block_selected_sparse_gradients_equal_dense_ones():
    grad_out = make_qkv(205, seed=1)[0]

    def gradients(attend, dtype, *config):
        leaves = [x.to(dtype).requires_grad_() for x in make_qkv(205)]
        attend(*leaves, *config).backward(grad_out.to(dtype))
        return [x.grad for x in leaves]

    sparse = gradients(infllm_attention, torch.float32, small_config(topk=20))
    dense = gradients(infllm_attention, torch.float32, DENSE)
    exact = gradients(reference.attention, torch.float64, DENSE)
    for x, true, same in zip(sparse, exact, dense, strict=True):
        assert_within_rounding(x, true, same, factor=3)


@pytest.mark.parametrize("Sq", [204, 1, 30])
def test_below_dense_len_it_is_sdpa_bit_for_bit(Sq):
    q, k, v = make_qkv(204, Sq=Sq)
    out = infllm_attention(q, k, v, small_config(dense_len=205))
    mask = torch.ones(Sq, 204, dtype=torch.bool).tril(204 - Sq)
    expected = (
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if Sq == 204
        else F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    )
    if Sq == 204:
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out, expected)


def test_equality_with_dense_len_is_sparse():
    qkv = make_qkv(205)
    dense = infllm_attention(*qkv, DENSE)
    assert torch.equal(infllm_attention(*qkv, small_config(dense_len=206)), dense)
    sparse = infllm_attention(*qkv, small_config(dense_len=205))
    assert not torch.allclose(sparse, dense, atol=1e-2)


def test_later_tokens_never_change_earlier_outputs():
    config = small_config(engine="fused")
    q, k, v = make_qkv(205)
    before = infllm_attention(q, k, v, config)
    k[:, :, 130:] += 10
    v[:, :, 130:] = torch.nan
    after = infllm_attention(q, k, v, config)
    assert torch.equal(after[:, :, :112], before[:, :, :112])
    torch.testing.assert_close(after[:, :, :128], before[:, :, :128])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_other(name, poison):
    config = small_config()
    clean = dict(zip(("query", "key", "value"), make_qkv(205, Hq=8), strict=True))
    poisoned = dict(clean, **{name: clean[name].clone()})
    poisoned[name][0, 1, 100, 3] = poison
    with torch.no_grad():
        before, after = (infllm_attention(**x, config=config)[0] for x in (clean, poisoned))
        selected = select_blocks(poisoned["query"], poisoned["key"], config)
    mask = reference.attention_mask(selected, 16, 205)
    if name == "value":
        reached = torch.zeros(8, 205, dtype=torch.bool)
        reached[4:] = mask[0, 1, :, 100]
    else:
        exact = reference.masked_attention(**poisoned, mask=mask, scale=0.25)[0]
        reached = ~exact.isfinite().all(-1)
    assert reached.any()
    assert torch.equal(~after.isfinite().all(-1), reached)
    # Queries that score the poison may select other blocks; the others must not change.
    chosen_anew = torch.zeros(8, 205, dtype=torch.bool)
    chosen_anew[:4, 100] = name == "query"
    chosen_anew[4:, 100:] = name == "key"
    same = ~(reached | chosen_anew)
    torch.testing.assert_close(after[same], before[same], rtol=0, atol=1e-6)


def test_a_choice_made_beforehand_is_used():
    q, k, v = make_qkv(205)
    config = small_config(engine="fused")
    other = select_blocks(*make_qkv(205, seed=5)[:2], config)
    mask = reference.attention_mask(other, 16, 205)
    out = infllm_attention(q, k, v, config, selected=other)
    exact = reference.masked_attention(q, k, v, mask, scale=0.25)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


def test_scale_is_used_in_choosing_and_in_attending():
    q, k, v = make_qkv(205)
    config = small_config(engine="fused")
    out = infllm_attention(q, k, v, config, scale=1.0)
    exact = reference.attention(q, k, v, config, scale=1.0)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_traces_as_one_graph(training):
    config = small_config()
    grad_out = make_qkv(205, seed=1)[0]

    def run(attend):
        leaves = [x.requires_grad_(training) for x in make_qkv(205)]
        out = attend(*leaves)
        if not training:
            return [out]
        out.backward(grad_out)
        return [out.detach(), *(x.grad for x in leaves)]

    compiled = torch.compile(lambda q, k, v: infllm_attention(q, k, v, config), fullgraph=True)
    expected = run(lambda q, k, v: infllm_attention(q, k, v, config))
    for x, y in zip(run(compiled), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


def test_many_lengths_compile_few_graphs():
    config = small_config()
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: infllm_attention(q, k, v, config), fullgraph=True, backend=counter
    )
    for S in range(100, 350, 10):
        compiled(*(x.requires_grad_() for x in make_qkv(S)))
    assert counter.frame_count <= 4


def test_uncompiled_flex_is_replaced_by_the_exact_operator_and_said_once():
    config = small_config(engine="flex")
    qkv = make_qkv(205, Hq=8)
    exact = attend_exactly(*qkv, config)
    with (
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(record=True) as shown,
    ):
        warnings.simplefilter("default")
        out, again = (infllm_attention(*qkv, config) for _ in range(2))
    (warning,) = shown
    assert "did not take up FlexAttention" in str(warning.message)
    assert torch.equal(out, again)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


def test_beyond_the_recompile_limit_the_result_is_still_right(monkeypatch):
    config = small_config(engine="flex")
    torch.compiler.reset()
    monkeypatch.setattr(flex_compiled, "MAX_GRAPHS", 1)
    infllm_attention(*make_qkv(60, Hq=8), config)
    longer = make_qkv(130, Hq=8)
    with pytest.warns(RuntimeWarning, match="did not take up FlexAttention"):
        out = infllm_attention(*longer, config)
    torch.testing.assert_close(out.double(), attend_exactly(*longer, config), rtol=0, atol=1e-6)
    torch.compiler.reset()


def test_memory_of_training_is_linear_in_the_length():
    config = InfLLMConfig(topk=4, window_size=128, dense_len=-1)
    peak = {}
    for S in (2048, 8192):
        leaves = [x.requires_grad_() for x in make_qkv(S, Hq=2, Hkv=1)]
        with WatchTensors() as watch:
            infllm_attention(*leaves, config).sum().backward()
        peak[S] = watch.largest_bytes
    assert peak[8192] <= 4 * peak[2048]


GOOD = make_qkv(64)


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        ((GOOD[0][0], *GOOD[1:]), r"query must be \[B, H, S, D\], got shape \(4, 64, 16\)"),
        ((GOOD[0][:, :, :0], *GOOD[1:]), "query must not be empty"),
        ((GOOD[0].expand(2, -1, -1, -1), *GOOD[1:]), "one batch size, got 2 and 1"),
        ((GOOD[0][:, :3], *GOOD[1:]), "multiple of key heads, got 3 and 2"),
        ((GOOD[0], GOOD[1][:, :, :9], GOOD[2][:, :, :9]), "not be longer than key"),
        ((GOOD[0][..., :8], *GOOD[1:]), "one head dim, got 8 and 16"),
        ((GOOD[0], GOOD[1], GOOD[2][..., :8]), "value must have the shape of key"),
        ((GOOD[0].half(), *GOOD[1:]), "one dtype, got torch.float16 and torch.float32"),
        ((GOOD[0], GOOD[1], GOOD[2].half()), "key and value must have one dtype"),
        (tuple(x.int() for x in GOOD), "query must be floating point, got torch.int32"),
        ((GOOD[0].to("meta"), *GOOD[1:]), "on one device, got meta and cpu"),
        ((GOOD[0], GOOD[1], GOOD[2].to("meta")), "on one device, got cpu and meta"),
        (make_qkv(8, D=257), "head dim must be at most 256, got 257"),
    ],
)
def test_bad_input_is_named_in_one_line(qkv, message):
    with pytest.raises(ValueError, match=message) as error:
        infllm_attention(*qkv, small_config())
    assert "\n" not in str(error.value)


def test_use_nope_asks_for_the_choice():
    with pytest.raises(NotImplementedError, match="pass selected="):
        infllm_attention(*GOOD, small_config(use_nope=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward on GPUs")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo of torch 2.11
@pytest.mark.parametrize("engine", ["flex", "fused"])
@pytest.mark.parametrize(
    ("groups", "D"), [(16, 128), (4, 128), (7, 64), (32, 256), (16, 96), (16, 32)]
)
def test_every_engine_trains_on_a_gpu(engine, groups, D):
    config = small_config(engine=engine)
    inputs = make_qkv(205, Hq=2 * groups, D=D, dtype=torch.bfloat16)
    grad_out = make_qkv(205, Hq=2 * groups, D=D, seed=1)[0]
    selected = select_blocks(*inputs[:2], config)
    mask = reference.attention_mask(selected, 16, 205)

    def run(attend, dtype, device="cpu"):
        leaves = [x.clone().to(device, dtype).requires_grad_() for x in inputs]
        out = attend(*leaves)
        out.backward(grad_out.to(device, dtype))
        return [x.detach().cpu() for x in (out, *(x.grad for x in leaves))]

    def masked(q, k, v):
        k, v, seen = (x.repeat_interleave(groups, 1) for x in (k, v, mask))
        return (q @ k.mT * D**-0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v

    def ours(q, k, v):
        if engine == "flex":
            assert can_train(q, k, config.block_size)
        return infllm_attention(q, k, v, config, selected=selected.cuda())

    results = run(ours, torch.bfloat16, "cuda")
    exact, plain = run(masked, torch.float64), run(masked, torch.bfloat16)
    for actual, true, same in zip(results, exact, plain, strict=True):
        assert_within_rounding(actual, true, same, factor=3)
