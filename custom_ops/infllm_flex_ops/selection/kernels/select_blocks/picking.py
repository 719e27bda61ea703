"""Launch the kernel that picks blocks, for rows whose scores lie in a workspace."""

from typing import NamedTuple

import triton
from torch import Tensor

from infllm_flex_ops.selection.kernels.select_blocks.pick import SEGMENT, pick_kernel


class Parts(NamedTuple):
    """The equal parts of the positions that a table of documents tells about; no part, all 0."""

    count: int
    size: int
    rows: int  # whole tiles, so that no tile holds two documents; some rows then have no query
    first: int  # the part of the first query

    @property
    def total(self) -> int:
        """Rows of all parts from the first query's on."""
        return (self.count - self.first) * self.rows


def divide_into_parts(documents: Tensor | None, kv_len: int, offset: int, tokens: int) -> Parts:
    """Describe the parts of a table of documents for tiles of so many tokens."""
    if documents is None:
        return Parts(0, 0, 0, 0)
    count = documents.shape[1]
    size = kv_len // count
    return Parts(count, size, triton.cdiv(size, tokens) * tokens, offset // size)


def count_taken(room: int, init_blocks: int) -> int:
    """Count the segments that hold the ``room`` best blocks of a row, up to a power of two."""
    forced = triton.cdiv(init_blocks, SEGMENT.value)
    return triton.next_power_of_2(max(room - init_blocks, 0) + forced + 1)


class Picker(NamedTuple):
    """Fills rows of ``out [B, Hkv, Sq, K]`` with the blocks that their scores choose."""

    out: Tensor
    documents: Tensor | None
    parts: Parts
    offset: int  # position of the first query
    num_blocks: int
    block_size: int
    init_blocks: int
    local_blocks: int
    num_selected: int
    keeps_bests: bool  # whether the scoring kernel writes the best score of each segment

    def count_listed(self, rows: range) -> int:
        """Count the blocks that some of the rows see, up to a power of two."""
        last = (self.offset + rows.stop - 1) // self.block_size
        visible = last + 1 if self.documents is None else self.num_blocks
        return max(128, triton.next_power_of_2(visible))

    def count_segments(self, rows: range) -> int:
        """Count the segments that the rows' blocks are picked from; 0: from all blocks."""
        if not self.keeps_bests:
            return 0
        taken = count_taken(self.num_selected - self.local_blocks - 1, self.init_blocks)
        return taken if 2 * taken * SEGMENT.value <= self.count_listed(rows) else 0

    def pick(self, scores: Tensor, bests: Tensor, heads: range, rows: range, columns: int) -> None:
        """Pick for ``rows`` of ``heads`` by ``scores [heads, rows, columns]``; 0: take every block.

        ``bests [heads, rows, columns // SEGMENT]`` holds the best score of each segment.
        """
        N = self.count_listed(rows) if columns else 16  # nothing scored, nothing to choose
        picked = self.count_segments(rows) if columns else 0
        width = max(N // SEGMENT.value, picked * SEGMENT.value) if picked else N
        Hkv, Sq, K = self.out.shape[1:]
        pick_kernel[(len(heads) * len(rows),)](
            scores,
            bests,
            self.out,
            self.out if self.documents is None else self.documents,
            heads.start,
            rows.start,
            rows.stop,
            self.offset,
            columns,
            Sq,
            K,
            Hkv,
            self.parts.count,
            self.parts.first,
            BLOCK_SIZE=self.block_size,
            INIT_BLOCKS=self.init_blocks,
            LOCAL_BLOCKS=self.local_blocks,
            PART=self.parts.size,
            PART_ROWS=self.parts.rows,
            BLOCK_K=triton.next_power_of_2(self.num_selected),
            TAKEN=picked,
            N=N,
            num_warps=max(1, width // 1024),
            # Fewer registers let more rows fit side by side, as long as nothing spills.
            maxnreg=(88 if picked else 72) if width <= 1024 else 128,
        )
