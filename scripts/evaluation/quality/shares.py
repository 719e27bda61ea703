"""What a choice of blocks holds of dense attention, and of that on needles, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from evaluation.quality.arms import Way
from evaluation.quality.parts import SkippedError
from evaluation.quality.rows import Question
from evaluation.quality.scoring import Scorer
from evaluation.quality.settings import QualitySettings
from evaluation.quality.tasks import Maker
from evaluation.quality.words import Vocabulary
from evaluation.selection import LayerInputs, judge_selection, recorded_inputs
from infllm_flex.config import InfLLMConfig
from infllm_flex.selection import select_blocks

TASK = "keys12"
_LOOKING = 0.3  # a head that puts more of its attention on a needle looks at it


def judge_shares(
    settings: QualitySettings,
    model: Path,
    way: Way,
    device: torch.device,
    vocabulary: Vocabulary,
    text: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Let a model attend densely, and look at what its choice would hold of that.

    Args:
        settings: The whole comparison.
        model: Its folder.
        way: The choice.
        device: Where it computes.
        vocabulary: What facts are made of.
        text: Held-out tokens ``[N]``.
        seed: Of the rows.

    Returns:
        ``layers``: by kind and layer, means over rows. ``attention``: the share of dense attention
        in the chosen blocks; ``attention_best`` and ``attention_window``: in the best as many, and
        in the nearest; ``needle``: the share of the attention on a needle, where a head puts more
        than 0.3 of its own there; ``needle_best``: alike in the best blocks; ``needle_cases``:
        how often one does.

    Raises:
        SkippedError: A query may see more than half of the sequence.
    """
    config = way.attention
    assert config is not None  # of dense attention there is no choice to judge
    if way.visible(settings.length) > settings.length // 2:
        raise SkippedError(
            f"shares are judged where a query sees at most half of {settings.length} tokens, "
            f"{way.name} sees {way.visible(settings.length)}"
        )
    scorer = Scorer(model, device)
    maker = Maker(vocabulary, text, settings.length + 1, True, settings.tuning.questions)
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    with way.on(scorer.model):
        for number in range(settings.judge.share_rows):
            row = maker.row(TASK, Random(f"shares/{seed}/{number}"))
            ids = row.tokens[None, :-1].to(device)
            with recorded_inputs(scorer.model) as inputs, scorer.arithmetic():
                scorer.model.get_decoder()(input_ids=ids, use_cache=False)
            for place, layer in enumerate(inputs.values()):
                values = _of_layer(_as_computed(layer, scorer), config, row.questions)
                for kind, tensor in values.items():
                    found[kind][str(place)].append(tensor)
    layers = {
        kind: {place: float(torch.cat(some).mean()) for place, some in by_layer.items()}
        for kind, by_layer in found.items()
    }
    layers["needle_cases"] = {
        place: float(sum(len(t) for t in some)) for place, some in found["needle"].items()
    }
    # A layer in which no head looks at needles has no share of them.
    return {
        "layers": {
            kind: {place: value for place, value in by_layer.items() if value == value}
            for kind, by_layer in layers.items()
        }
    }


def _as_computed(layer: LayerInputs, scorer: Scorer) -> LayerInputs:
    if not scorer.is_half:
        return layer
    half = torch.bfloat16
    return LayerInputs(layer.query.to(half), layer.key.to(half), layer.scale)


@torch.no_grad()
def _of_layer(
    layer: LayerInputs, config: InfLLMConfig, questions: Sequence[Question]
) -> dict[str, Tensor]:
    report = judge_selection(layer, config)
    needle, best = needle_shares(layer, config, questions)
    return {
        "attention": torch.tensor([report.mass]),
        "attention_best": torch.tensor([report.mass_best]),
        "attention_window": torch.tensor([report.mass_window]),
        "needle": needle,
        "needle_best": best,
    }


def needle_shares(
    layer: LayerInputs, config: InfLLMConfig, questions: Sequence[Question]
) -> tuple[Tensor, Tensor]:
    """The share of the attention on a needle that lies in the chosen blocks, and in the best.

    Args:
        layer: Queries and keys of a sequence, one row.
        config: The choice.
        questions: Of the sequence; the query is that which predicts the first token of an answer,
            the needle its first fact.

    Returns:
        Two float32 ``[cases]``, one for every head and question where more than 0.3 of the head's
        attention is on the needle.
    """
    query, key, scale = layer
    S, G = key.shape[2], query.shape[1] // key.shape[1]
    at = torch.tensor([q.answer.start - 1 for q in questions], device=key.device)
    first = int(at.min())
    selected = select_blocks(query[:, :, first:], key, config, scale=scale)[0, :, at - first]
    logits = query[0, :, at].float() @ key[0].repeat_interleave(G, 0).float().mT * scale
    hidden = torch.arange(S, device=key.device) > at[:, None]
    weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1)  # [Hq, Q, S]
    on_needle = torch.zeros_like(weights)
    for number, question in enumerate(questions):
        span = slice(question.needles[0].start, question.needles[0].end)
        on_needle[:, number, span] = weights[:, number, span]
    looks = on_needle.sum(-1) > _LOOKING  # [Hq, Q]
    mass = _by_block(weights, config).unflatten(0, (-1, G)).mean(1)  # [Hkv, Q, Nkv]
    best = mass.topk(min(config.num_selected, mass.shape[-1]), -1).indices
    needles = _by_block(on_needle, config)  # [Hq, Q, Nkv]
    shares = []
    for chosen in (selected.long(), best):
        kept = torch.zeros(*mass.shape[:-1], mass.shape[-1] + 1, device=key.device)
        kept.scatter_(-1, chosen.masked_fill(chosen < 0, mass.shape[-1]), 1.0)
        held = (needles * kept[..., :-1].repeat_interleave(G, 0)).sum(-1) / on_needle.sum(-1)
        shares.append(held[looks].cpu())
    return shares[0], shares[1]


def _by_block(weights: Tensor, config: InfLLMConfig) -> Tensor:
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % config.block_size))
    return padded.unflatten(-1, (-1, config.block_size)).sum(-1)
