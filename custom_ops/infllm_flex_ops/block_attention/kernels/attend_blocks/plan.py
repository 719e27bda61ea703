"""How the forward pass is divided into programs: from shapes, dtypes and the device alone."""

import triton
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.tile_args import Tile
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.device import compute_capability, knows_gluon
from infllm_flex_ops.triton_common.descriptors import can_use_tma

_WIDE_KEYS = 48 << 10  # up to here tiles of 128 rows also pay for groups of 4 to 7 heads
GROUP_ROWS = 64  # of a warpgroup, of which two or three divide a tile
_MOST_GROUPS = 3  # whose sums fit into the registers
_GROUP_KEYS = 64  # keys per block that warpgroups were measured with


def choose_tile_tokens(
    G: int,
    k: Tensor,
    block_size: int,
    kv_len: int | None = None,
    most_groups: int = _MOST_GROUPS,
) -> int:
    """Choose the tokens per tile: as many as fit into the rows of a program.

    Args:
        G: Query heads per KV head.
        k: Keys ``[B, Hkv, Skv, D]``, or their pages.
        block_size: Keys per block.
        kv_len: Keys of the sequence, if ``k`` are pages.
        most_groups: Warpgroups that may share a tile, if keys are loaded by TMA.
    """
    # 64 membership bits take registers: only where they were measured.
    most = union_lists.MAX_TILE_TOKENS if compute_capability(k) == 90 else 32
    # The copy engine loads boxes of one page.
    if not can_use_tma(k) or (kv_len is not None and k.shape[2] % block_size != 0):
        most_groups = 2
    rows = _most_rows(G, k, block_size, kv_len or k.shape[2], most_groups)
    if G == 1 and rows > 2 * GROUP_ROWS:
        most *= 2  # or one word's tokens would be the rows of one warpgroup
    return union_lists.choose_tile_tokens(G, rows, most)


def _most_rows(G: int, k: Tensor, block_size: int, kv_len: int, most_groups: int) -> int:
    """Rows of the largest tile worth its union.

    A larger tile loads more keys at once, and each row uses fewer of them. Warpgroups share the
    loads, but each skips the blocks that none of its own tokens selected. Their tiles are as large
    as registers and membership bits allow.
    """
    if k.element_size() > 2:
        return 16  # float32 without tensor cores: operands in registers
    if can_specialize(k, most_groups * GROUP_ROWS, block_size):
        return most_groups * GROUP_ROWS
    fits = compute_capability(k) == 90 and k.shape[3] in (64, 128)
    wide = fits and (G >= 8 or (G >= 4 and kv_len <= _WIDE_KEYS))
    return 128 if wide else 64


def can_specialize(x: Tensor, tile_rows: int, block_size: int) -> bool:
    """Whether the kernel of specialised warps can attend, if keys and values are loaded by TMA.

    Args:
        x: Queries or keys.
        tile_rows: Rows of a tile.
        block_size: Keys per block.
    """
    block_d = triton.next_power_of_2(x.shape[3])
    fits = x.element_size() == 2 and block_d in (64, 128) and block_size == _GROUP_KEYS
    fits = fits and GROUP_ROWS < tile_rows <= _MOST_GROUPS * GROUP_ROWS
    return fits and compute_capability(x) == 90 and knows_gluon()


def choose_tile(
    q: Tensor, tile_rows: int, block_size: int, use_tma: bool, in_pages: bool = False
) -> tuple[Tile, dict[str, int]]:
    """Choose how many of the tile's rows a program takes, and how many keys at a time.

    Args:
        q: Queries, ``D`` last.
        tile_rows: Rows of a tile.
        block_size: Keys per block.
        use_tma: Whether keys and values are loaded by TMA.
        in_pages: Whether they lie in pages.

    Returns:
        Compile-time sizes, and compile options such as ``num_warps``.
    """
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    fp32 = q.element_size() > 2
    # Wide heads take registers, and so do masks, of a head dim that is no power of two.
    masked = q.shape[-1] < block_d and not (use_tma and tile_rows >= 64)
    costly = block_d > 128 or masked
    most_rows, most_keys = (16, 16) if fp32 else (64, 32) if costly else (128, 64)
    rows = max(16, min(most_rows, triton.next_power_of_2(tile_rows)))
    # Triton 3.7 gives four warps too few registers on sm_100 for these.
    wide = rows == 64 and (costly or block_d < 128)
    # Without TMA the look-ups of pages take registers, too.
    wide = wide or (rows == 64 and in_pages and not use_tma)
    tile = Tile(
        PARTS=triton.cdiv(tile_rows, rows),
        ROWS=rows,
        BLOCK_N=max(16, min(most_keys, triton.next_power_of_2(block_size))),
        BLOCK_D=block_d,
        FP32=fp32,
        USE_TMA=use_tma,
    )
    options = {
        "num_warps": 8 if rows == 128 or wide or (fp32 and block_d <= 128) else 4,
        "num_stages": 1 if fp32 else 2,
    }
    if rows == 128 and compute_capability(q) == 90:
        options["maxnreg"] = 128  # two programs side by side on a multiprocessor
    return tile, options
