"""Attend from tiles of queries to their listed blocks, with gradients, on any device."""

from typing import Any

import torch
from torch import Tensor

from custom_ops.tile_chunks import TileLists, heads


@torch.library.custom_op("infllm_flex::attend_blocks", mutates_args=())
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    words: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys of its own blocks, causally.

    Gathers the union of a tile's blocks and masks each token's own choice within it, a chunk of
    tiles at a time, so memory beside the result does not grow with the length.

    Args:
        q: Queries ``[B, Hq, Sq, D]``, the last ``Sq`` of ``Skv`` positions.
        k: Keys ``[B, Hkv, Skv, D]``.
        v: Values ``[B, Hkv, Skv, D]``.
        num: Blocks that a tile's tokens selected together, int32 ``[B, Hkv, Nq]``; this and the
            next two as ``tile_blocks(..., separate_full=False)`` returns them.
        idx: The blocks, int32 ``[B, Hkv, Nq, W]``, ascending.
        words: Their membership words, int32 ``[B, Hkv, Nq, W]``.
        block_size: Keys per block.
        tile_tokens: Tokens per tile.
        scale: Factor on the dot products.

    Returns:
        Output ``[B, Hq, Sq, D]`` in the dtype of ``q``, and its natural log-sum-exp, at least
        float32 ``[B, Hq, Sq]``. A query with no key has output 0 and log-sum-exp -inf.
        Gradients flow to q, k and v through the output, none through the log-sum-exp.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=accumulate)
    lists = TileLists(num, idx, words, block_size, tile_tokens)
    for head in heads(q, k):
        keys, values = (head.blocks(x, block_size, accumulate) for x in (k, v))
        finite = bool(values.isfinite().all())
        for chunk in lists.chunks(head, k.shape[2], q.shape[2]):
            rows = chunk.load(head, q, accumulate) * scale
            logits = chunk.logits(rows, chunk.gather(keys))
            peak = logits.amax(-1, keepdim=True)
            peak.masked_fill_(peak == -torch.inf, 0.0)  # no key: exp(-inf - 0) = 0, not nan
            weights = logits.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            summed = chunk.weigh(weights, chunk.gather(values), finite)
            chunk.store(head, out, summed / total.masked_fill(total == 0, 1.0))
            chunk.store(head, lse[..., None], peak + total.log())
    return out, lse


@torch.library.custom_op("infllm_flex::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num: Tensor,
    idx: Tensor,
    words: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attend_blocks``, recomputing the weights chunk by chunk.

    Args:
        grad_out: Gradient of the output ``[B, Hq, Sq, D]``.
        q: Queries, as in ``attend_blocks``.
        k: Keys.
        v: Values.
        out: The output of ``attend_blocks``.
        lse: Its log-sum-exp.
        num: Blocks per tile; this and the next two as in ``attend_blocks``.
        idx: The blocks.
        words: Their membership words.
        block_size: Keys per block.
        tile_tokens: Tokens per tile.
        scale: Factor on the dot products.

    Returns:
        Gradients of q, k and v, in their shapes and dtypes.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    lists = TileLists(num, idx, words, block_size, tile_tokens)
    Skv = k.shape[2]
    for head in heads(q, k):
        keys, values = (head.blocks(x, block_size, accumulate) for x in (k, v))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for chunk in lists.chunks(head, Skv, q.shape[2]):
            rows = chunk.load(head, q, accumulate) * scale
            drows = chunk.load(head, grad_out, accumulate)
            row_lse = chunk.load(head, lse[..., None], accumulate)
            row_lse = row_lse.masked_fill(row_lse == -torch.inf, 0.0)
            correction = (drows * chunk.load(head, out, accumulate)).sum(-1, keepdim=True)
            gathered = chunk.gather(keys)
            weights = chunk.logits(rows, gathered).sub_(row_lse).exp_()
            chunk.add_to_blocks(dvalues, weights.mT @ drows)
            dlogits = (drows @ chunk.gather(values).mT).sub_(correction).mul_(weights)
            chunk.add_to_blocks(dkeys, dlogits.mT @ rows)
            chunk.store(head, dq, dlogits @ gathered * scale)
        dk[head.batch, head.kv] = dkeys.flatten(0, 1)[:Skv]
        dv[head.batch, head.kv] = dvalues.flatten(0, 1)[:Skv]
    return dq, dk, dv


@attend_blocks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    words: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulate)


@attend_blocks.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    words: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from custom_ops.kernels.attend_blocks import launch

    return launch(q, k, v, num, idx, words, block_size, tile_tokens, scale)


@attend_blocks_backward.register_kernel("cuda")
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num: Tensor,
    idx: Tensor,
    words: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from custom_ops.kernels.attend_blocks_backward import launch

    lists = (num, idx, words)
    return launch(grad_out, q, k, v, out, lse, *lists, block_size, tile_tokens, scale)


@attend_blocks_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, block_size, tile_tokens, scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors[:3], out, lse, *tensors[3:])
    ctx.settings = (block_size, tile_tokens, scale)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = attend_blocks_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None,) * 6


attend_blocks.register_autograd(_backward, setup_context=_save_for_backward)
