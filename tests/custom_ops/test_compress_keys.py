import pytest
import torch

from infllm_flex import reference
from infllm_flex_ops import compress_keys
from tests.inputs import make_qkv
from tests.tolerance import assert_within_rounding

SHAPES = [
    pytest.param(64, 32, 16, id="aligned"),
    pytest.param(97, 32, 16, id="ragged"),
    pytest.param(32, 32, 16, id="one_window"),
    pytest.param(300, 128, 64, id="coarse"),
    pytest.param(40, 12, 4, id="three_strides"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("S", "size", "stride"), SHAPES)
def test_means_the_mean_of_whole_windows(S, size, stride, dtype):
    key = make_qkv(S, B=2, D=24, dtype=dtype)[1]
    actual = compress_keys(key, size, stride)
    for b in range(2):
        for h in range(2):
            exact = reference.compress_keys(key[b, h], size, stride)
            plain = key[b, h].unfold(0, size, stride).mean(-1)
            assert_within_rounding(actual[b, h], exact, plain)


def test_a_sequence_shorter_than_a_window_has_none():
    assert compress_keys(make_qkv(31)[1], 32, 16).shape == (1, 2, 0, 16)


def test_a_window_has_the_same_bits_wherever_it_stands():
    key = make_qkv(200, B=2)[1]
    whole = compress_keys(key, 32, 16)
    assert torch.equal(compress_keys(key[:1, :, 48:130], 32, 16), whole[:1, :, 3:7])


def test_strides_do_not_matter():
    key = make_qkv(80)[1]
    spread = torch.empty(1, 2, 16, 80).transpose(2, 3).copy_(key)
    assert torch.equal(compress_keys(spread, 32, 16), compress_keys(key, 32, 16))


@pytest.mark.parametrize("S", [80, 20])
def test_is_registered_right(S):
    key = make_qkv(S)[1]
    token_major = key.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (key, token_major):
        torch.library.opcheck(torch.ops.infllm_flex.compress_keys.default, (x, 32, 16))


def test_compiles_as_one_graph():
    key = make_qkv(80)[1]
    compiled = torch.compile(lambda k: compress_keys(k, 32, 16) * 2, fullgraph=True)
    assert torch.equal(compiled(key), compress_keys(key, 32, 16) * 2)


def test_refuses_gradients():
    key = make_qkv(80)[1].requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        compress_keys(key, 32, 16).sum().backward()
