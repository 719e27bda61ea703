"""Compare a model that is dense or sparse by sequence with the same model by position."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.quality.statistics import Interval, interval
from infllm_flex import dense, patch_model
from infllm_flex.config import InfLLMConfig

DENSE, SEQUENCE, POSITION = RULES = ("dense", "sequence", "position")
BETWEEN, AFTER = "between", "after"
_ROWS_AT_ONCE = 512


class Region(NamedTuple):
    """Positions of a sequence, ``first`` to ``last``, both inclusive."""

    name: str
    first: int
    last: int


class Row(NamedTuple):
    """The predictions of one text, in one region, by one rule.

    Attributes:
        nats: Nats per token.
        mean: Mean absolute difference of the log-probabilities of the text's tokens from those by
            sequence.
        largest: The largest of these differences.
    """

    text: str
    region: Region
    rule: str
    nats: float
    mean: float
    largest: float


def regions(config: InfLLMConfig, length: int) -> list[Region]:
    """The positions at which the rules differ, and the later ones.

    Raises:
        ValueError: The rules are one function, or the text is too short to show a difference.
    """
    if config.longest_dense <= config.budget_tokens:
        raise ValueError(
            f"dense_len must exceed the budget of {config.budget_tokens} tokens by 2 or more, "
            f"or the rules are one, got {config.dense_len}"
        )
    if length <= config.dense_len:
        raise ValueError(f"length must exceed dense_len = {config.dense_len}, got {length}")
    # The last position predicts a token that the text does not have.
    return [
        Region(BETWEEN, config.budget_tokens, config.longest_dense - 1),
        Region(AFTER, config.longest_dense, length - 2),
    ]


def compare(model: Any, config: InfLLMConfig, texts: dict[str, Tensor]) -> Iterator[list[Row]]:
    """Predict each text by every rule.

    Args:
        model: A causal LM of transformers.
        config: Settings; ``dense_by`` has no effect.
        texts: Token ids ``[S]`` by name.

    Yields:
        The rows of a text.
    """
    for name, tokens in texts.items():
        found = {rule: log_probabilities(model, config, rule, tokens) for rule in RULES}
        rows = []
        for region in regions(config, len(tokens)):
            inside = slice(region.first, region.last + 1)
            for rule, values in found.items():
                change = (values - found[SEQUENCE])[inside].abs()
                nats = -float(values[inside].mean())
                rows.append(
                    Row(name, region, rule, nats, float(change.mean()), float(change.max()))
                )
        yield rows


@torch.no_grad()
def log_probabilities(model: Any, config: InfLLMConfig, rule: str, tokens: Tensor) -> Tensor:
    """Log-probability of each token after the first: float64 ``[S - 1]``."""
    by = SEQUENCE if rule == DENSE else rule
    patch_model(model, dataclasses.replace(config, dense_by=by))
    with dense(model) if rule == DENSE else contextlib.nullcontext():
        logits = model(tokens[None, :-1], use_cache=False).logits[0]
    labels = tokens[1:, None].split(_ROWS_AT_ONCE)
    parts = zip(logits.split(_ROWS_AT_ONCE), labels, strict=True)
    # The sum of float32 exponentials would be off by more than the rules differ in places.
    return torch.cat([x.double().log_softmax(-1).gather(1, y)[:, 0] for x, y in parts])


def difference(rows: list[Row], region: str, rule: str) -> tuple[Interval, Interval, float]:
    """Compare a rule with that by sequence, over all texts.

    Returns:
        The difference in nats per token and the mean absolute difference of log-probabilities, each
        with its 95 % interval over texts, and the largest difference.
    """
    chosen = {
        which: [row for row in rows if row.region.name == region and row.rule == which]
        for which in (rule, SEQUENCE)
    }
    ours, theirs = (torch.tensor([row.nats for row in chosen[which]]) for which in chosen)
    mean = torch.tensor([row.mean for row in chosen[rule]])
    nats, change = (
        interval(x[None, :, None], lambda means: means[0], nested=False)
        for x in (ours - theirs, mean)
    )
    change = change._replace(low=max(0.0, change.low))  # a mean of absolute values
    return nats, change, max(row.largest for row in chosen[rule])
