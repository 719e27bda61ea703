import pytest
import torch

from infllm_flex_ops import append_windows, compress_keys
from tests.inputs import make_qkv

SIZES = (8, 4, 32, 16)


def arguments(B=2, S=100, start=(0, 13), end=(100, 80), num_new=100):
    k = make_qkv(S, B=B)[1]
    windows = [torch.full((B, 2, C, 16), torch.nan) for C in (30, 10)]
    counters = torch.tensor(start), torch.tensor(end) - num_new
    return [k, *windows, *counters, None, None, num_new, *SIZES]


def test_writes_the_whole_windows_of_each_rows_own_tokens_and_no_others():
    args = arguments()
    append_windows(*args)
    for row, (start, end) in enumerate(zip((0, 13), (100, 80), strict=True)):
        for windows, size, stride in ((args[1], 8, 4), (args[2], 32, 16)):
            expected = compress_keys(args[0][row : row + 1, :, start:end], size, stride)[0]
            count = expected.shape[1]
            assert torch.equal(windows[row, :, :count], expected)
            assert windows[row, :, count:].isnan().all()


def test_windows_from_before_the_new_slots_are_not_touched():
    args = arguments(num_new=20)
    append_windows(*args)
    assert args[1][0, :, :19].isnan().all()  # whole at 80 tokens
    assert not args[1][0, :, 19:24].isnan().any()
    assert args[2][0, :, :4].isnan().all()
    assert not args[2][0, :, 4].isnan().any()


def test_without_coarse_keys():
    args, both = arguments(), arguments()
    args[2] = None
    append_windows(*args)
    append_windows(*both)
    assert torch.equal(args[1].nan_to_num(), both[1].nan_to_num())


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_windows_of_the_slowest_dims_have_the_bits_of_a_row_of_its_own(kept, size):
    k, _, _, *counters = arguments()[:5]
    windows = torch.full((2, 2, 103, 6), 7.0).to(kept)
    append_windows(k, windows, None, *counters, None, None, 100, size, size, 32, 16)
    for row, (start, end) in enumerate(zip((0, 13), (100, 80), strict=True)):
        keys = k[row : row + 1, :, start:end, [5, 6, 7, 13, 14, 15]]
        keys = keys if kept == torch.float8_e4m3fn else keys.to(kept)
        expected = compress_keys(keys, size, size)[0].to(kept)
        count = expected.shape[1]
        assert torch.equal(windows[row, :, :count].float(), expected.float())
        assert (windows[row, :, count:].float() == 7).all()


def test_counters_move_on_or_become_what_is_given():
    args = arguments(num_new=20)
    append_windows(*args)
    assert args[3].tolist() == [0, 13]
    assert args[4].tolist() == [100, 80]
    other = arguments(num_new=20, end=(50, 50))
    other[5:7] = torch.tensor([0, 13]), torch.tensor([100, 80])
    append_windows(*other)
    for ours, theirs in zip(other[1:5], args[1:5], strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    other[5:7] = torch.tensor([2]), torch.tensor(90)
    append_windows(*other)
    assert args[3].tolist() == [0, 13]
    assert (other[3] == 2).all()
    assert (other[4] == 90).all()


@pytest.mark.parametrize("num_new", [1, 20])
def test_all_windows_of_a_row_that_begins_elsewhere_are_written_again(num_new):
    args, fresh = arguments(num_new=99, end=(99, 99)), arguments(start=(0, 40), end=(100, 100))
    append_windows(*args)
    args[4] -= num_new - 1
    args[5], args[7] = torch.tensor([0, 40]), num_new
    append_windows(*args)
    append_windows(*fresh)
    for ours, theirs, size, stride in ((args[1], fresh[1], 8, 4), (args[2], fresh[2], 32, 16)):
        for row, length in enumerate((100, 60)):
            count = (length - size) // stride + 1
            assert torch.equal(ours[row, :, :count], theirs[row, :, :count])


@pytest.mark.parametrize("coarse", [True, False])
def test_is_registered_right(coarse):
    args = arguments()
    for x in args[1:3]:
        x.zero_()
    args[2] = args[2] if coarse else None
    torch.library.opcheck(torch.ops.infllm_flex.append_windows.default, args)


def test_what_is_too_short_is_refused():
    args = arguments()
    args[1] = args[1][:, :, :20]
    with pytest.raises(ValueError, match="windows must have room for 24 in row 0, got 20"):
        append_windows(*args)
    with pytest.raises(ValueError, match="k must hold 101 slots in row 0, got 100"):
        append_windows(*arguments(end=(101, 80)))
