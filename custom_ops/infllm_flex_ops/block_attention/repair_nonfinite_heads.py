"""Repair attention where NaN or inf among keys and values reached rows that do not see them."""

from typing import Any

from torch import Tensor

from infllm_flex_ops.block_attention.attend_blocks import attend_blocks
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.sizes import group_size


@define_operator(mutates_args=("out",))
def repair_nonfinite_heads(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, block_size: int, scale: float
) -> None:
    """Overwrite the attention of heads whose keys or values are not all finite, in place.

    Attention by tiles multiplies unseen values by zero, and zero times NaN is NaN. Here every row
    reads only what it sees. No gradient flows.

    Args:
        out: Attention over the selected blocks ``[B, Hq, Sq, D]``; kept where all is finite.
        q: Queries ``[B, Hq, Sq, D]``, the last ``Sq`` of ``Skv`` positions.
        k: Keys ``[B, Hkv, Skv, D]``.
        v: Values ``[B, Hkv, Skv, D]``.
        selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        block_size: Keys per block.
        scale: Factor on the dot products.
    """
    finite = (k.isfinite() & v.isfinite()).flatten(2).all(-1)
    groups = group_size(q.shape[1], k.shape[1])
    for b, h in (~finite).nonzero().tolist():
        at, group = (slice(b, b + 1), slice(h, h + 1)), slice(h * groups, (h + 1) * groups)
        heads = (x[at] for x in (k, v, selected))
        out[b, group] = attend_blocks(q[b : b + 1, group], *heads, block_size, scale)[0][0]


@repair_nonfinite_heads.register_fake
def _(out: Tensor, *rest: Any) -> None:
    return None


cuda_launcher(
    repair_nonfinite_heads, "block_attention.kernels.attend_blocks", "repair_nonfinite_heads"
)
