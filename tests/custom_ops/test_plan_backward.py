"""How the backward of ``attend_blocks`` is divided into programs, planned without a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from infllm_flex_ops.block_attention.kernels.attend_blocks_backward import plan
from infllm_flex_ops.triton_common import descriptors

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def make_plan(
    dtype, D, G, tokens, S=8192, B=1, Hkv=2, block_size=64, width=128, strides=None, slots=None
):
    q = torch.empty(B, Hkv * G, S, D, dtype=dtype, device="meta")
    if strides is not None:
        q = torch.empty_strided(q.shape, strides, dtype=dtype, device="meta")
    k = torch.empty(B, Hkv, S, D, dtype=dtype, device="meta")
    idx = torch.empty(B, Hkv, -(-S // tokens), width, dtype=torch.int32, device="meta")
    return plan.plan_backward(torch.empty_like(q), q, k, k, idx, block_size, tokens, slots)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def capability(request, monkeypatch):
    monkeypatch.setattr(descriptors, "compute_capability", lambda _: request.param)
    return request.param


@pytest.mark.parametrize("G", [1, 3, 7, 16])
@pytest.mark.parametrize("D", [40, 128, 256])
@pytest.mark.parametrize("dtype", [BRAIN, FLOAT], ids=str)
def test_programs_cover_every_row_and_every_key(dtype, D, G, capability):
    tokens, block_size, S = 8, 48, 1000
    made = make_plan(dtype, D, G, tokens, S=S, B=3, block_size=block_size)
    dq, dkv = made.dq.tile, made.dkv.tile
    heads, tiles = 3 * 2, 125
    assert G * tokens <= dq.PARTS * dq.ROWS
    assert G * tokens > (dq.PARTS - 1) * dq.ROWS
    assert made.dq.programs == heads * tiles * dq.PARTS
    chunks = -(-block_size // dkv.BLOCK_N)
    assert made.num_blocks == 21
    assert made.dkv.programs == heads * (made.max_splits + 21) * chunks  # one range
    assert made.reduce_programs == heads * made.max_splits * 3
    assert made.row_layout.TILE_ROWS == dkv.PARTS * dkv.ROWS >= G * tokens
    assert dq.BLOCK_D == dkv.BLOCK_D >= D
    assert (dtype == FLOAT,) * 2 == (dq.FP32, dkv.FP32)


def test_only_hopper_loads_by_tma(capability):
    made = make_plan(BRAIN, 128, 16, 4)
    assert made.keys_by_tma == made.dq.tile.USE_TMA == (capability == 90)
    assert made.rows_by_tma == made.dkv.tile.USE_TMA == (capability == 90)


@pytest.mark.parametrize(
    ("G", "tokens", "D", "block_size", "by_tma"),
    [
        (16, 4, 128, 64, True),
        (8, 8, 64, 128, True),
        (5, 8, 128, 64, True),  # three of eight heads of a box are padding
        (3, 16, 128, 64, True),
        (9, 4, 128, 64, False),  # seven of sixteen
        (16, 3, 128, 64, False),  # tiles of 48 rows
        (16, 4, 256, 64, False),
        (16, 4, 128, 48, False),  # blocks do not fill steps of 64 keys
        (128, 1, 128, 64, False),  # a box holds no whole token
    ],
)
def test_rows_are_loaded_by_tma_where_boxes_cut_tiles_into_tokens(
    G, tokens, D, block_size, by_tma, monkeypatch
):
    monkeypatch.setattr(descriptors, "compute_capability", lambda _: 90)
    made = make_plan(BRAIN, D, G, tokens, block_size=block_size)
    assert made.rows_by_tma == by_tma
    layout = made.row_layout
    if by_tma:
        padded = 1 << (G - 1).bit_length()
        assert layout.BOX_TOKENS * padded == layout.BOX_ROWS
        assert tokens * padded == layout.TILE_ROWS
    else:
        assert layout.BOX_TOKENS == 0


@pytest.mark.parametrize(
    ("G", "tokens", "S", "Hkv", "ranges"),
    [
        # A range of 2048 tokens; four of two heads have 256 blocks.
        (16, 4, 1 << 16, 2, (2048, 512, 28, 128, 2, 2)),
        (16, 4, 1 << 16, 16, (512, 512, 31, 32, 8, 2)),
        (16, 4, 8192 + 2048, 2, (2560, 512, 0, 160, 2, 2)),  # too short
        (16, 4, 8192 + 2049, 2, (2048, 512, 2, 128, 2, 2)),
        # One head of one range has 512 blocks.
        (1, 64, 1 << 16, 16, (0, 512, 2, 0, 256, 2)),
        (4, 16, 8192 * 2 + 16, 32, (512, 512, 2, 128, 2, 3)),
    ],
)
def test_ranges_of_16_mib_begin_with_enough_blocks(G, tokens, S, Hkv, ranges, monkeypatch):
    monkeypatch.setattr(descriptors, "compute_capability", lambda _: 90)
    made = make_plan(BRAIN, 128, G, tokens, S=S, Hkv=Hkv)
    assert made.dkv.tile.IN_RANGES
    assert made.dkv.ranges == ranges
    _, _, others, first_blocks, _, _ = ranges
    per_head = made.max_splits + first_blocks + others * made.num_blocks
    assert made.dkv.programs == Hkv * per_head


@pytest.fixture
def hopper(monkeypatch):
    for module in (plan, descriptors):
        monkeypatch.setattr(module, "compute_capability", lambda _: 90)


@pytest.mark.parametrize(
    ("G", "D", "dtype", "block_size", "S", "gathers"),
    [
        (2, 128, BRAIN, 64, 1 << 16, True),
        (8, 64, HALF, 64, 1 << 16, True),
        (8, 64, HALF, 128, 1 << 16, False),
        (1, 128, BRAIN, 64, 1 << 16, False),
        (9, 128, BRAIN, 64, 1 << 16, False),
        (4, 80, BRAIN, 64, 1 << 16, False),  # masks take registers
        (4, 256, BRAIN, 64, 1 << 16, False),
        (4, 128, FLOAT, 64, 1 << 16, False),
        (4, 128, BRAIN, 48, 1 << 16, False),
        (4, 128, BRAIN, 64, 1 << 18, True),
        (4, 128, BRAIN, 64, (1 << 18) + (1 << 17), False),  # tables of more than 1 GiB
    ],
)
def test_tokens_are_gathered_for_a_few_heads_per_group(G, D, dtype, block_size, S, gathers, hopper):
    made = make_plan(dtype, D, G, 8, S=S, block_size=block_size, slots=96)
    assert (made.dkv.tile.GATHERED == 8) == gathers
    assert make_plan(dtype, D, G, 8, S=S, block_size=block_size).dkv.tile.GATHERED == 0
    if gathers:
        assert made.dkv.num_tiles == S
        assert made.dkv.shape.TILE_TOKENS == 1
        assert made.row_layout == (8 * G, 0, 8 * G)
        ranges, heads = made.dkv.ranges, 2
        assert ranges.tiles * 2 * G * D * 2 <= 16 << 20
        per_head = made.max_splits + ranges.first_blocks + ranges.others * made.num_blocks
        assert made.dkv.programs == heads * per_head


def test_other_devices_gather_no_tokens(monkeypatch):
    monkeypatch.setattr(plan, "compute_capability", lambda _: 100)
    assert make_plan(BRAIN, 128, 4, 16, slots=96).dkv.tile.GATHERED == 0


def test_other_devices_walk_one_range(monkeypatch):
    monkeypatch.setattr(descriptors, "compute_capability", lambda _: 100)
    made = make_plan(BRAIN, 128, 16, 4, S=1 << 16)
    assert not made.dkv.tile.IN_RANGES
    assert made.dkv.ranges.others == 0
    assert made.dkv.ranges.first_tiles == 1 << 14


def test_splits_hold_an_average_list_and_stay_bounded():
    long = make_plan(BRAIN, 128, 16, 4, S=1 << 20, width=400)
    assert long.dkv.split_size == (1 << 18) * 400 // (1 << 14)
    assert long.max_splits == 64 + (1 << 14) // 16
    assert make_plan(BRAIN, 128, 16, 4).dkv.split_size == 256 * 8192 // 1024


def test_offsets_of_a_tile_beyond_32_bits_are_noticed():
    assert make_plan(BRAIN, 128, 16, 4).fits_32_bits
    far = (1 << 40, 1 << 33, 128, 1)
    assert not make_plan(BRAIN, 128, 16, 4, strides=far).fits_32_bits
