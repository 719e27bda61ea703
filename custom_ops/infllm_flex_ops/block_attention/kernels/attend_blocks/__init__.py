"""Triton kernels of ``attend_blocks``: softmax attention of tiles to the blocks in their lists."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_blocks.forward import attend_kernel
from infllm_flex_ops.block_attention.kernels.attend_blocks.nonfinite import (
    ExactTile,
    attend_exact_reads_kernel,
    find_nonfinite_kernel,
)
from infllm_flex_ops.block_attention.kernels.attend_blocks.plan import (
    GROUP_ROWS,
    can_specialize,
    choose_tile,
    choose_tile_tokens,
)
from infllm_flex_ops.block_attention.kernels.tile_args import Shape
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.sizes import group_size
from infllm_flex_ops.triton_common.descriptors import can_use_tma, describe, describe_for_gluon
from infllm_flex_ops.triton_common.tensor_args import Lists, view

__all__ = ["attend", "choose_tile_tokens", "launch", "repair_nonfinite_heads"]

_REPAIR_PROGRAMS = 512  # per head; they share its tokens, and end at once if all is finite
_SEARCHED_KEYS = 64  # keys that a program searches for NaN and inf


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_size: int,
    scale: float,
    tile_tokens: int | None = None,
    unit: int | None = None,
    num: Tensor | None = None,
    idx: Tensor | None = None,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """List the blocks of every tile, unless the lists are given, and attend to them."""
    if num is None or idx is None or words is None or tile_tokens is None:
        tile_tokens = tile_tokens or choose_tile_tokens(
            group_size(q.shape[1], k.shape[1]), k, block_size
        )
        tile_tokens = union_lists.fit_unit(tile_tokens, unit)
        num, idx, words = union_lists.list_blocks(selected, k.shape[2], block_size, tile_tokens)
    return launch(q, k, v, num, idx, words, block_size, tile_tokens, scale)


class KeyPages(NamedTuple):
    """Where the keys and values of one sequence lie in pages.

    Attributes:
        table: Its pages in order, int32 ``[max_pages]``, contiguous.
        kv_len: Its keys.
        size: Keys of a page.
    """

    table: Tensor
    kv_len: int
    size: int


def launch_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    table: Tensor,
    kv_len: int,
    block_size: int,
    scale: float,
) -> Tensor:
    """List the blocks of every tile of ``q [Sq, Hq, D]`` and attend to them in pages."""
    queries, lists = q.transpose(0, 1)[None], selected[None]
    tile_tokens = choose_tile_tokens(group_size(q.shape[1], k.shape[1]), k, block_size, kv_len)
    num, idx, words = union_lists.list_blocks(lists, kv_len, block_size, tile_tokens)
    pages = KeyPages(table.contiguous(), kv_len, k.shape[2])
    out, _ = launch(queries, k, v, num, idx, words, block_size, tile_tokens, scale, pages)
    return out[0].transpose(0, 1)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    membership: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
    pages: KeyPages | None = None,
) -> tuple[Tensor, Tensor]:
    """Allocate the output and its log-sum-exp, and attend with a program per tile and KV head."""
    B, Hq, Sq, D = q.shape
    Hkv = k.shape[1]
    out = torch.empty_like(q)
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    shape = Shape(Hq // Hkv, D, block_size, tile_tokens, pages.size if pages else 0)
    lists = Lists(num.contiguous(), idx.contiguous(), membership.contiguous(), idx.shape[3])
    arguments = _arguments(q, k, lists, out, lse, shape, scale, pages)
    tile_rows, programs = shape.G * tile_tokens, B * Hkv * num.shape[2]
    # The copy engine loads boxes of one page.
    use_tma = can_use_tma(k, v) and (pages is None or pages.size % block_size == 0)
    specialized = use_tma and can_specialize(q, tile_rows, block_size)
    if specialized:
        _launch_specialized(k, v, arguments, shape, programs)
    else:
        tile, options = choose_tile(q, tile_rows, block_size, use_tma, pages is not None)
        k_desc, v_desc = (describe(x, tile.BLOCK_N) if use_tma else None for x in (k, v))
        attend_kernel[(programs * tile.PARTS,)](
            **arguments, k=view(k), v=view(v), k_desc=k_desc, v_desc=v_desc, TILE=tile, **options
        )
    # The specialised warps multiply what lies behind the last key in its page by zero.
    searched = -(-arguments["Skv"] // block_size) * block_size if specialized and pages else None
    _attend_exact_reads(k, v, q, arguments, searched)
    return out, lse


def repair_nonfinite_heads(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, block_size: int, scale: float
) -> None:
    """Overwrite ``out`` of the heads whose keys or values hold NaN or inf, in place."""
    if out.numel() == 0:
        return
    num = (selected >= 0).sum(-1, dtype=torch.int32)
    lists = Lists(num, selected.contiguous(), None, selected.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    shape = Shape(q.shape[1] // k.shape[1], q.shape[3], block_size, 1)
    _attend_exact_reads(k, v, q, _arguments(q, k, lists, out, lse, shape, scale, None), None)


def _arguments(
    q: Tensor,
    k: Tensor,
    lists: Lists,
    out: Tensor,
    lse: Tensor,
    shape: Shape,
    scale: float,
    pages: KeyPages | None,
) -> dict[str, Any]:
    """Collect the arguments that all kernels of the forward pass take."""
    return {
        "q": view(q),
        "lists": lists,
        "out": view(out),
        "lse_ptr": lse,
        "Sq": q.shape[2],
        "table": None if pages is None else pages.table,
        "Skv": k.shape[2] if pages is None else pages.kv_len,
        "num_tiles": lists.num.shape[2],
        "qk_scale_log2": scale * math.log2(math.e),
        "Hkv": k.shape[1],
        "SHAPE": shape,
    }


def _launch_specialized(
    k: Tensor, v: Tensor, arguments: dict[str, Any], shape: Shape, programs: int
) -> None:
    """Attend by specialised warps; their kernel is imported only where Gluon is known."""
    from infllm_flex_ops.block_attention.kernels.attend_blocks.specialized import (
        SpecializedTile,
        attend_specialized_kernel,
    )

    groups = triton.cdiv(shape.G * shape.TILE_TOKENS, GROUP_ROWS)
    attend_specialized_kernel[(programs,)](
        **arguments,
        k_desc=describe_for_gluon(k, shape.BLOCK_SIZE),
        v_desc=describe_for_gluon(v, shape.BLOCK_SIZE),
        TILE=SpecializedTile(
            BLOCK_D=triton.next_power_of_2(shape.D),
            GROUPS=groups,
            # Slots of keys and values: 192 KiB with head dim 128, or 160 beside the queries.
            SLOTS=6 if groups == 2 else 5,
            GROUP_REGISTERS=232 if groups == 2 else 160,  # of 64 Ki, as many as groups leave
            FETCH_REGISTERS=24,
        ),
        num_warps=4,
    )


def _attend_exact_reads(
    k: Tensor, v: Tensor, q: Tensor, arguments: dict[str, Any], searched: int | None
) -> None:
    """Write the result of heads that hold NaN or inf again; the host does not wait to know.

    They are searched for in all keys, or in the first ``searched`` tokens of pages.
    """
    B, Hkv, D = q.shape[0], k.shape[1], k.shape[3]
    S = arguments["Skv"] if searched is None else searched
    block_d = max(16, triton.next_power_of_2(D))
    rows = max(16, triton.next_power_of_2(q.shape[1] // Hkv))
    fp32 = q.element_size() > 2
    in_pages = arguments["table"] is not None
    # With look-ups of pages, eight warps of float32 would spill where four do not.
    wide = rows * block_d > 4096 or (fp32 and not in_pages)
    has_nonfinite = torch.zeros(B * Hkv, dtype=torch.int32, device=q.device)
    find_nonfinite_kernel[(B * Hkv * triton.cdiv(S, _SEARCHED_KEYS),)](
        k=view(k),
        v=view(v),
        has_nonfinite_ptr=has_nonfinite,
        table=arguments["table"],
        S=S,
        Hkv=Hkv,
        D=D,
        BLOCK_S=_SEARCHED_KEYS,
        BLOCK_D=block_d,
        PAGE=arguments["SHAPE"].PAGE,
        num_warps=8,
    )
    attend_exact_reads_kernel[(B * Hkv, min(q.shape[2], _REPAIR_PROGRAMS))](
        **arguments,
        has_nonfinite_ptr=has_nonfinite,
        k=view(k),
        v=view(v),
        TILE=ExactTile(rows, 16, block_d, fp32),
        num_warps=8 if wide else 4,
        num_stages=1,
    )
