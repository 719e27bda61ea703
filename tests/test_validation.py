"""Every entry casts, checks and scales its inputs by the same functions."""

import numpy as np
import pytest
import torch

from infllm_flex import (
    CompressedKeys,
    build_block_mask,
    decode_attention,
    infllm_attention,
    select_blocks,
)
from infllm_flex.attention import attend_in_layout
from infllm_flex.autocast import attend_outside_autocast
from infllm_flex.batches import lay_out_padded, read_bounds
from infllm_flex.chunks import attend_chunk
from infllm_flex.decoding import paged_attention
from infllm_flex.validation import assert_in_graph, require_rows, resolve_scale
from tests.inputs import make_qkv, small_config
from tests.paged import draw_rows

CONFIG = small_config(engine="fused", dense_len=60)
MASK = torch.ones(2, 150, dtype=torch.bool)
MASK[0, :40] = False
LAYOUT = lay_out_padded(MASK, CONFIG, 150)

ENTRIES = {
    "infllm_attention": lambda q, k, v: infllm_attention(q, k, v, CONFIG),
    "padded": lambda q, k, v: infllm_attention(q, k, v, CONFIG, attention_mask=MASK),
    "attend_in_layout": lambda q, k, v: attend_in_layout(q, k, v, CONFIG, LAYOUT),
    "attend_chunk": lambda q, k, v: attend_chunk(q[:, :, 20:], k, v, CONFIG, attention_mask=MASK),
    "select_blocks": lambda q, k, v: select_blocks(q, k, CONFIG, attention_mask=MASK),
}


@pytest.mark.parametrize("dtypes", [(0, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
def test_autocast_gives_the_bits_of_inputs_cast_beforehand(entry, dtypes):
    choice = torch.float32, torch.bfloat16
    qkv = [x.to(choice[i]) for x, i in zip(make_qkv(150, B=2), dtypes, strict=True)]
    expected = ENTRIES[entry](*(x.bfloat16() for x in qkv))
    with torch.autocast(qkv[0].device.type, torch.bfloat16):
        assert torch.equal(ENTRIES[entry](*qkv), expected)


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name != "select_blocks"])
def test_autocast_leaves_float64_alone_and_mixed_dtypes_are_refused_without_it(entry):
    q, k, v = (x.double() for x in make_qkv(150, B=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ENTRIES[entry](q, k, v), ENTRIES[entry](q, k, v))
        assert ENTRIES[entry](q, k, v).dtype == torch.float64
    with pytest.raises(ValueError, match="must have one dtype"):
        ENTRIES[entry](q.float(), k.float(), v.bfloat16())


def test_a_function_runs_outside_autocast_on_cast_inputs():
    def attend(q, k, v, scale):
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
        return (q.float() @ k.float().mT * scale).softmax(-1) @ v.float()

    q, k, v = make_qkv(30, Hq=2)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_outside_autocast(attend, q, k, v.bfloat16(), 0.25)
    assert out.dtype == torch.float32
    assert torch.equal(out, attend(*(x.bfloat16() for x in (q, k, v)), 0.25))
    meta = [x.to("meta") for x in (q, k, v)]
    assert attend_outside_autocast(lambda q, k, v: q, *meta) is meta[0]


def test_the_scale_defaults_to_the_root_of_the_head_dim():
    (query, *_) = make_qkv(8, D=16)
    assert resolve_scale(query, None) == 0.25
    assert resolve_scale(query, 0.5) == 0.5


@pytest.mark.parametrize("length", [50, 150], ids=["dense", "sparse"])
@pytest.mark.parametrize("scale", [0.0, -0.25, torch.nan, torch.inf, "1", torch.tensor(0.25)])
def test_a_scale_that_is_no_positive_number_is_refused(scale, length):
    q, k, v = make_qkv(length)
    state = CompressedKeys(CONFIG, k)
    rows = draw_rows(CONFIG, [length], 16)
    for attend in (
        lambda: infllm_attention(q, k, v, CONFIG, scale=scale),
        lambda: select_blocks(q, k, CONFIG, scale=scale),
        lambda: decode_attention(q[:, :, -1:], k, v, state, scale=scale),
        lambda: paged_attention(q[0, :, -1][None], rows.cache, rows.batch([1]), scale=scale),
    ):
        with pytest.raises(ValueError, match="scale must be a positive, finite number, got"):
            attend()


def test_a_scale_may_be_any_number_type():
    q, k, v = make_qkv(150)
    expected = infllm_attention(q, k, v, CONFIG, scale=1.0)
    for scale in (1, np.float32(1), np.float64(1)):
        assert torch.equal(infllm_attention(q, k, v, CONFIG, scale=scale), expected)


@pytest.mark.parametrize("length", [50, 150], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.long(), "selected must be int32, got torch.int64"),
        (lambda s: s.float(), "selected must be int32, got torch.float32"),
        (lambda s: s[:, :1], r"selected must be \[B, Hkv, Sq, K\] = \[2, 2, \d+, K\], got"),
        (lambda s: s.repeat(1, 2, 1, 1), "selected must be .B, Hkv, Sq, K"),  # by query heads
        (lambda s: s.repeat(2, 1, 1, 1), "selected must be .B, Hkv, Sq, K"),
        (lambda s: s[:, :, 1:], "selected must be .B, Hkv, Sq, K"),
        (lambda s: s[..., :0], "selected must be .B, Hkv, Sq, K"),
        (lambda s: s[0], "selected must be .B, Hkv, Sq, K"),
        (lambda s: s.to("meta"), "selected must be on the device of key"),
    ],
)
def test_blocks_that_do_not_fit_the_queries_are_refused(change, message, length):
    q, k, v = make_qkv(length, B=2)
    selected, mask = select_blocks(q, k, CONFIG), MASK[:, -length:]
    infllm_attention(q, k, v, CONFIG, selected=selected, attention_mask=mask)
    for mask in (None, MASK[:, -length:]):
        with pytest.raises(ValueError, match=message):
            infllm_attention(q, k, v, CONFIG, selected=change(selected), attention_mask=mask)


@pytest.mark.parametrize(
    "disorder",
    [
        lambda s: s.flip(-1),
        lambda s: torch.cat([s, s], -1),  # the union of two selections, not sorted
        lambda s: s.repeat_interleave(2, -1),
        lambda s: torch.cat([torch.full_like(s[..., :1], -1), s], -1),
    ],
)
def test_blocks_in_no_order_are_refused(disorder):
    """Kernels would lose some of them, and count others twice."""
    q, k, v = make_qkv(150, B=2)
    selected = select_blocks(q, k, CONFIG)
    late = selected.clone()
    late[1, :, 149] = selected[1, :, 149].flip(-1)
    message = "selected must hold ascending blocks, each once, and -1 in unused slots after them"
    for wrong in (disorder(selected), late):
        with pytest.raises(ValueError, match=f"{message}: not so in row {int(wrong is late)}"):
            infllm_attention(q, k, v, CONFIG, selected=wrong)
        with pytest.raises(ValueError, match=message):
            build_block_mask(wrong, CONFIG, kv_len=150, num_groups=2)
    in_graph = torch.compile(lambda s: infllm_attention(q, k, v, CONFIG, selected=s))
    with pytest.raises(RuntimeError, match=message):
        in_graph(late)


@pytest.mark.parametrize(
    ("bounds", "starts", "is_valid"),
    [
        ([0, 5], [0], True),
        ([0, 2, 2, 5], [0, 2], True),
        ([0, 5, 5], [0], True),
        ([1, 5], [1], False),
        ([0, 3, 2, 5], [0, 2, 3], False),
        ([0, 4], [0], False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bounds_are_read_in_one_place(bounds, starts, is_valid, dtype):
    opens, valid = read_bounds(torch.tensor(bounds, dtype=dtype), 5)
    assert opens[0].nonzero().flatten().tolist() == starts
    assert bool(valid) is is_valid


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float32])
def test_an_assertion_in_a_graph_leaves_values_and_dtype(dtype):
    x = torch.tensor([0, 1, 3]).to(dtype)
    compiled = torch.compile(
        lambda x, is_fine: assert_in_graph(x, is_fine, "must be fine"),
        fullgraph=True,
        backend="aot_eager",
    )
    for check in (compiled, lambda x, is_fine: assert_in_graph(x, is_fine, "must be fine")):
        out = check(x, torch.tensor(True))
        assert out.dtype == dtype
        assert torch.equal(out, x)
        with pytest.raises(RuntimeError, match="must be fine"):
            check(x, torch.tensor(False))


def test_an_invalid_row_is_named_where_values_can_be_read():
    rows, x = torch.tensor([True, True, False, False]), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="rows must be fine: not so in row 2"):
        require_rows(rows, "rows must be fine", x)
    assert require_rows(rows[:2], "rows must be fine", x) is x
