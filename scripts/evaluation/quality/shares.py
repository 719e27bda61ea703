"""Fractions of dense attention that selected blocks hold, in all and on needles, by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from evaluation.quality.arms import AttentionMode
from evaluation.quality.names import SHARES
from evaluation.quality.parts import SkippedError
from evaluation.quality.rows import Question
from evaluation.quality.scoring import Scorer
from evaluation.quality.settings import QualitySettings
from evaluation.quality.tasks import evaluation_maker
from evaluation.quality.words import Vocabulary
from evaluation.selection import LayerInputs, judge_selection, recorded_inputs
from infllm_flex.config import InfLLMConfig
from infllm_flex.selection import select_blocks
from infllm_flex_ops.sizes import group_size

_LOOKING = 0.3  # a head looks at a needle if more than this fraction of its attention is on it


def judge_shares(
    settings: QualitySettings,
    model: Path,
    mode: AttentionMode,
    device: torch.device,
    vocabulary: Vocabulary,
    text: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Run a model densely, and measure the fraction of its attention that selected blocks hold.

    Args:
        settings: All settings.
        model: Folder of the model.
        mode: The attention mode whose selection is measured.
        device: Device of the model.
        vocabulary: Words and values of the facts.
        text: Held-out tokens ``[N]``.
        seed: Seed of the rows.

    Returns:
        ``layers``: by kind and layer, means over rows. ``attention``: fraction of dense attention
        in the selected blocks; ``attention_best`` and ``attention_window``: in as many best blocks,
        and in as many nearest ones; ``needle``: fraction of the attention on a needle in the
        selected blocks, over heads that look at it; ``needle_best``: in as many best blocks;
        ``needle_cases``: number of such heads and questions.

    Raises:
        SkippedError: A query may see more than half of the sequence.
    """
    config = mode.attention
    assert config is not None  # dense attention selects nothing
    if mode.visible(settings.length) > settings.length // 2:
        raise SkippedError(
            f"shares need queries that see at most half of {settings.length} tokens, {mode.name} "
            f"sees {mode.visible(settings.length)}"
        )
    scorer = Scorer(model, device)
    maker = evaluation_maker(settings, vocabulary, text)
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    with mode.on(scorer.model):
        for number in range(settings.judge.share_rows):
            row = maker.row(SHARES, Random(f"shares/{seed}/{number}"))
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
    # A layer in which no head looks at a needle has no value.
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
    """Measure the fraction of the attention on needles in the selected, and in the best blocks.

    Args:
        layer: Queries and keys of a sequence, one row.
        config: Sparsity settings.
        questions: Questions of the sequence. The query of each is the one that predicts the first
            token of the answer, its needle the first fact.

    Returns:
        Two float32 ``[cases]``; a case is a head and a question whose needle has more than 0.3 of
        the head's attention.
    """
    query, key, scale = layer
    S, G = key.shape[2], group_size(query.shape[1], key.shape[1])
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
