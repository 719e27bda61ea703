"""Documents packed into one row, in every form that transformers has for it."""

import torch

from tests.patch.models import tokens

LENGTHS = (40, 1, 130, 109)  # two below dense_len, two beyond
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
TOTAL = sum(LENGTHS)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
IDS = tokens(TOTAL, 1)

PACKINGS = {
    "bounds": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS.clone()},
    "bounds and positions": {"cu_seq_lens_q": BOUNDS, "position_ids": POSITIONS},
    "positions": {"position_ids": POSITIONS},
    "positions without cache": {"position_ids": POSITIONS, "use_cache": False},
    "positions behind a mask": {"position_ids": POSITIONS, "attention_mask": torch.ones_like(IDS)},
}
# A mask with padding between real tokens.
HOLE = torch.ones_like(IDS)
HOLE[0, 50:60] = 0


def alone(model, ids=IDS, lengths=LENGTHS):
    """Logits of every document by itself, concatenated."""
    return torch.cat([model(part).logits for part in ids.split(list(lengths), 1)], 1)


def positions_from(kwargs):
    """Add positions to bounds, which leave the rotary embedding to the caller."""
    return {"position_ids": POSITIONS, **kwargs}


def padded_batch(sides=("left", "right", "both")):
    """Rows of 140, 60 and 99 tokens, then one of padding: ids, mask and positions."""
    S = 160
    mask = torch.zeros(len(sides) + 1, S, dtype=torch.int64)
    starts = {"left": S - 140, "right": 0, "both": 30}
    for row, side, length in zip(mask, sides, (140, 60, 99), strict=False):
        row[starts[side] : starts[side] + length] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return tokens(S, len(mask)), mask, positions


def assert_close(ours, theirs):
    """Equal up to the rounding of other shapes."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)
