"""Attention of tiles of queries to their listed blocks, with gradients, on any device."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.attend_blocks_backward import attend_blocks_backward
from infllm_flex_ops.block_attention.tile_chunks import Head, TileLists, heads
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.in_parallel import in_parallel
from infllm_flex_ops.sizes import group_size
from infllm_flex_ops.transforms import register_gradients, register_vmap


class ForwardLists(NamedTuple):
    """The blocks of each tile, as ``union_lists.list_blocks`` returns them.

    Attributes:
        tile_tokens: Tokens per tile.
        num: Blocks per tile, int32 ``[B, Hkv, Nq]``.
        idx: The blocks, int32 ``[B, Hkv, Nq, W]``, ascending.
        words: Membership bits of the blocks ``[B, Hkv, Nq, W]``.
    """

    tile_tokens: int
    num: Tensor
    idx: Tensor
    words: Tensor


def build_lists(
    G: int,
    k: Tensor,
    selected: Tensor,
    block_size: int,
    tile_tokens: int | None = None,
    unit: int | None = None,
) -> ForwardLists:
    """Build the lists that ``attend_blocks`` walks for ``G`` query heads per key/value head.

    The other arguments are those of ``attend_blocks``.
    """
    if tile_tokens is None and k.is_cuda:
        from infllm_flex_ops.block_attention.kernels.attend_blocks import choose_tile_tokens

        tile_tokens = choose_tile_tokens(G, k, block_size)
    elif tile_tokens is None:
        tile_tokens = union_lists.choose_tile_tokens(G)
    tile_tokens = union_lists.fit_unit(tile_tokens, unit)
    lists = union_lists.list_blocks(selected, k.shape[2], block_size, tile_tokens)
    return ForwardLists(tile_tokens, *lists)


@define_operator()
def attend_blocks(
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
    """Softmax attention of every query over the keys of its own blocks, causally.

    A tile of tokens attends to the union of their blocks, and each token's selection is masked
    within it. Memory other than the result and the lists does not grow with the length.

    Args:
        q: Queries ``[B, Hq, Sq, D]``, the last ``Sq`` of ``Skv`` positions.
        k: Keys ``[B, Hkv, Skv, D]``.
        v: Values ``[B, Hkv, Skv, D]``.
        selected: Blocks of each token, int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        block_size: Keys per block.
        scale: Factor on the dot products.
        tile_tokens: Tokens per tile, 1 to 64; None lets the device's rule choose.
        unit: Alignment of the first tokens of sequences. No tile then holds tokens of two.
        num: The first of three lists that ``build_lists`` has built for tiles of ``tile_tokens``;
            None builds them here. The backward builds its own, for tiles of its own size.
        idx: The second.
        words: The third.

    Returns:
        Output ``[B, Hq, Sq, D]`` in the dtype and layout of ``q``, and its natural log-sum-exp, at
        least float32 ``[B, Hq, Sq]``. A query with no key has output 0 and log-sum-exp -inf.
        Gradients flow to q, k and v through the output, none through the log-sum-exp.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=accumulate)
    if num is None or idx is None or words is None or tile_tokens is None:
        G = group_size(q.shape[1], k.shape[1])
        tile_tokens, num, idx, words = build_lists(G, k, selected, block_size, tile_tokens, unit)
    lists = TileLists(num, idx, words, block_size, tile_tokens)
    for head in heads(q, k):
        keys, values = (head.blocks(x, block_size, accumulate) for x in (k, v))
        finite = bool(values.isfinite().all())

        def attend(
            span: tuple[slice, int],
            head: Head = head,
            keys: Tensor = keys,
            values: Tensor = values,
            finite: bool = finite,
        ) -> None:
            chunk = lists.cut(head, span, k.shape[2], q.shape[2])
            rows = chunk.load(head, q, accumulate) * scale
            logits = chunk.logits(rows, chunk.gather(keys))
            peak = logits.amax(-1, keepdim=True)
            peak.masked_fill_(peak == -torch.inf, 0.0)  # no key: exp(-inf - 0) = 0, not NaN
            weights = logits.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            summed = chunk.weigh(weights, chunk.gather(values), finite)
            chunk.store(head, out, summed / total.masked_fill(total == 0, 1.0))
            chunk.store(head, lse[..., None], peak + total.log())

        in_parallel(attend, lists.spans(head))
    return out, lse


@attend_blocks.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulate)


cuda_launcher(attend_blocks, "block_attention.kernels.attend_blocks", "attend")


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, selected, *settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, selected)
    ctx.num_settings = len(settings)
    block_size, scale, tile_tokens, unit, num = (*settings, None, None, None)[:5]
    ctx.settings = block_size, scale, tile_tokens if num is None else None, unit


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = attend_blocks_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None,) * (1 + ctx.num_settings)


register_gradients(attend_blocks, _save_for_backward, _backward)
register_vmap(attend_blocks)
