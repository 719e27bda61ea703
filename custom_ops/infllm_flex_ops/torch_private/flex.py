"""Private APIs of FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Lists = tuple[Tensor | None, Tensor | None]
NO_LISTS: Lists = (None, None)


def block_mask(
    seq_lengths: tuple[int, int],
    block_size: tuple[int, int],
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    kv: tuple[Tensor, Tensor],
    full_kv: Lists = NO_LISTS,
    q: Lists = NO_LISTS,
    full_q: Lists = NO_LISTS,
) -> BlockMask:
    """Make a mask of lists in both directions.

    API: the undocumented constructor of ``BlockMask``, seen in 2.11 to 2.14.
    If it goes: TypeError in every call of the Flex engine.
    Instead: ``BlockMask.from_kv_blocks``, when it takes the lists of tiles by block as well.

    Args:
        seq_lengths: Rows and keys.
        block_size: Rows of a tile, and keys of a block.
        mask_mod: Which keys of the listed blocks a row sees.
        kv: Counts and indices of the blocks by tile.
        full_kv: Those of blocks that need no ``mask_mod``.
        q: Counts and indices of the tiles by block; needed for gradients.
        full_q: Those of tiles that need no ``mask_mod``.
    """
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask(
        seq_lengths=seq_lengths,
        kv_num_blocks=kv[0],
        kv_indices=kv[1],
        full_kv_num_blocks=full_kv[0],
        full_kv_indices=full_kv[1],
        q_num_blocks=q[0],
        q_indices=q[1],
        full_q_num_blocks=full_q[0],
        full_q_indices=full_q[1],
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
    )


def flex_options(is_divisible: bool, tile: tuple[int, int] | None = None) -> dict[str, Any]:
    """Make the options of FlexAttention's kernels that its documentation does not list.

    The backend avoids FlexAttention's kernel for few queries, whose conditions our tiles do not
    meet. ``IS_DIVISIBLE`` saves the tests at the ends of lengths that change from call to call,
    which FlexAttention would otherwise have to assume.

    API: ``BACKEND``, ``IS_DIVISIBLE``, ``SPARSE_Q_BLOCK_SIZE`` and ``SPARSE_KV_BLOCK_SIZE`` of
    ``kernel_options``, seen in 2.11 to 2.14.
    If it goes: slower kernels, or gradients of another mask.
    Instead: the sizes of the mask itself, once pytorch#176025 is fixed.

    Args:
        is_divisible: Whether lengths need no tests at their ends.
        tile: Rows and keys of a block of the mask, where the mask claims others.
    """
    options = {"BACKEND": "TRITON", "IS_DIVISIBLE": is_divisible}
    if tile is not None:
        options |= {"SPARSE_Q_BLOCK_SIZE": tile[0], "SPARSE_KV_BLOCK_SIZE": tile[1]}
    return options
