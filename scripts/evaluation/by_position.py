"""How well a model predicts text, by how much of it came before."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def bits_per_token(
    model: Any, windows: Tensor, batch_size: int, after_batch: Callable[[int], object] | None = None
) -> Tensor:
    """The cost of every token of some text, given what stands before it in its window.

    The model keeps the attention it has: dense, or patched.

    Args:
        model: A causal LM of transformers.
        windows: int64 ``[N, S + 1]``; the first token of a window is only given.
        batch_size: Windows per forward pass.
        after_batch: Called with the number of windows done since the last call.

    Returns:
        float32 ``[N, S]``, in bits, on the CPU. Entry ``[n, s]`` is token ``s + 1`` of window n.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    costs = []
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        logits = model(batch[:, :-1], use_cache=False).logits
        cost = F.cross_entropy(logits.transpose(1, 2).float(), batch[:, 1:], reduction="none")
        costs.append(cost.cpu() / math.log(2))
        if after_batch is not None:
            after_batch(len(batch))
    model.train(was_training)
    return torch.cat(costs)


@dataclass(frozen=True)
class Bucket:
    """Token positions ``first`` to ``last``, both inclusive, counted from 1."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def mean(self, bits: Tensor) -> float:
        """The mean of ``[N, S]`` costs over the bucket's positions."""
        return bits[:, self.first - 1 : self.last].mean().item()


def doubling_buckets(length: int, first: int) -> list[Bucket]:
    """Buckets that end at ``first``, twice that, four times that, ... and at ``length``."""
    buckets, start, end = [], 1, first
    while start <= length:
        buckets.append(Bucket(start, min(end, length)))
        start, end = end + 1, 2 * end
    return buckets


def standard_error(differences: Tensor) -> float:
    """Standard error of the mean of paired differences.

    Args:
        differences: One number per window ``[N]``; windows are what is drawn independently.
    """
    if len(differences) < 2:
        return math.nan
    return (differences.std() / math.sqrt(len(differences))).item()


def distant_repeats(windows: Tensor, distance: int, shortest: int = 4) -> Tensor:
    """Tokens that only a look far back can tell: the rest of a word last seen long before.

    A word is a run of ASCII letters, digits and underscores. Marked are its tokens from the third
    on, where the same whole word occurred earlier in the window and its last occurrence began more
    than ``distance`` tokens before this one.

    Args:
        windows: Bytes, int64 ``[N, S + 1]``.
        distance: In tokens.
        shortest: Letters a word must have.

    Returns:
        bool ``[N, S]``, aligned with `bits_per_token`.
    """
    marks = torch.zeros(len(windows), windows.shape[1], dtype=torch.bool)
    for number, window in enumerate(windows.tolist()):
        last_seen: dict[bytes, int] = {}
        for start, word in _words(window):
            if len(word) >= shortest and start - last_seen.get(word, start) > distance:
                marks[number, start + 2 : start + len(word)] = True
            last_seen[word] = start
    return marks[:, 1:]


def _words(window: Sequence[int]) -> list[tuple[int, bytes]]:
    return [(match.start(), match[0]) for match in re.finditer(rb"[A-Za-z0-9_]+", bytes(window))]
