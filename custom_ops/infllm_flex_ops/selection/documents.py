"""The sequences of a padded or packed batch, as the table ``documents`` describes them."""

from typing import NamedTuple

from torch import Tensor


class Sequence(NamedTuple):
    """A sequence of a padded or packed batch, or a whole batch row."""

    start: int  # position of the first token
    end: int  # one past the position of the last token
    budget: int


def check_documents(documents: Tensor | None, kv_len: int, q_len: int) -> None:
    """Check that the parts of the table are equal and that the queries start with a part.

    Raises:
        ValueError: The parts differ, or the queries start within a part.
    """
    if documents is None or kv_len == 0:
        return
    num_parts, q_offset = documents.shape[1], kv_len - q_len
    if num_parts == 0 or kv_len % num_parts or q_offset % (kv_len // num_parts):
        raise ValueError(
            f"documents must cut the kv_len = {kv_len} positions into equal parts, and the queries "
            f"must start with one; got {num_parts} parts and queries from position {q_offset} on"
        )


def list_sequences(documents: Tensor | None, b: int, kv_len: int, budget: int) -> list[Sequence]:
    """List the sequences of a batch row: the whole row, or those of the table."""
    if documents is None:
        return [Sequence(0, kv_len, budget)]
    parts = sorted({tuple(part) for part in documents[b].tolist()})
    return [Sequence(*part) for part in parts if part[0] < part[1]]
