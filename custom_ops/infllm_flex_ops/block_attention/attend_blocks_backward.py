"""The gradients of ``attend_blocks``: an operator of its own, so that compilers can trace it."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.tile_chunks import Head, TileLists, heads
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.in_parallel import in_parallel
from infllm_flex_ops.sizes import group_size
from infllm_flex_ops.transforms import refuse_gradients, register_vmap


@define_operator()
def attend_blocks_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    block_size: int,
    scale: float,
    tile_tokens: int | None = None,
    unit: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attend_blocks``; recomputes the weights of a chunk of tiles at a time.

    Args:
        grad_out: Gradient of the output ``[B, Hq, Sq, D]``.
        q: Queries, as in ``attend_blocks``.
        k: Keys.
        v: Values.
        out: The output of ``attend_blocks``.
        lse: Its log-sum-exp.
        selected: Blocks of each token.
        block_size: Keys per block.
        scale: Factor on the dot products.
        tile_tokens: Tokens per tile; None lets the device's rule for the backward choose.
        unit: As in ``attend_blocks``.

    Returns:
        Gradients of q, k and v, in their shapes and dtypes.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    tile_tokens = tile_tokens or union_lists.choose_tile_tokens(group_size(q.shape[1], k.shape[1]))
    tile_tokens = union_lists.fit_unit(tile_tokens, unit)
    num, idx, words = union_lists.list_blocks(selected, k.shape[2], block_size, tile_tokens)
    lists = TileLists(num, idx, words, block_size, tile_tokens)
    Skv = k.shape[2]
    for head in heads(q, k):
        keys, values = (head.blocks(x, block_size, accumulate) for x in (k, v))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)

        def differentiate(
            span: tuple[slice, int], head: Head = head, keys: Tensor = keys, values: Tensor = values
        ) -> tuple[Tensor, Tensor, Tensor]:
            chunk = lists.cut(head, span, Skv, q.shape[2])
            rows = chunk.load(head, q, accumulate) * scale
            drows = chunk.load(head, grad_out, accumulate)
            row_lse = chunk.load(head, lse[..., None], accumulate)
            row_lse = row_lse.masked_fill(row_lse == -torch.inf, 0.0)
            correction = (drows * chunk.load(head, out, accumulate)).sum(-1, keepdim=True)
            gathered = chunk.gather(keys)
            weights = chunk.logits(rows, gathered).sub_(row_lse).exp_()
            used = chunk.used()
            by_block = (-1, block_size)
            dvalues = (weights.mT @ drows).unflatten(1, by_block)[used]
            dlogits = (drows @ chunk.gather(values).mT).sub_(correction).mul_(weights)
            dkeys = (dlogits.mT @ rows).unflatten(1, by_block)[used]
            chunk.store(head, dq, dlogits @ gathered * scale)
            return chunk.slots[used], dkeys, dvalues

        def add(
            sums: tuple[Tensor, Tensor, Tensor], dkeys: Tensor = dkeys, dvalues: Tensor = dvalues
        ) -> None:
            slots, more_dkeys, more_dvalues = sums
            dkeys.index_add_(0, slots, more_dkeys)
            dvalues.index_add_(0, slots, more_dvalues)

        in_parallel(differentiate, lists.spans(head), add)
        dk[head.batch, head.kv] = dkeys.flatten(0, 1)[:Skv]
        dv[head.batch, head.kv] = dvalues.flatten(0, 1)[:Skv]
    return dq, dk, dv


@attend_blocks_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


cuda_launcher(
    attend_blocks_backward, "block_attention.kernels.attend_blocks_backward", "differentiate"
)


refuse_gradients(
    attend_blocks_backward,
    "attend_blocks has no second derivative: its gradients cannot be differentiated again "
    "(torch.func.hessian, backward through create_graph=True)",
)
register_vmap(attend_blocks_backward)
