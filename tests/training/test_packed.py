"""Packed documents have the loss that they have alone: nothing crosses their boundaries."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from infllm_flex.training.data import NO_LABEL, Batch, PackedSampler
from infllm_flex.training.model import build_model
from infllm_flex.training.settings import ModelSettings
from infllm_flex.training.stage_attention import stage_attention
from tests.tolerance import assert_within_rounding
from tests.training.data.test_sampler import documents
from tests.training.runs import ATTENTION, TINY, stage

LENGTH = 256


def costs(model, batch: Batch):
    """Loss of each label in nats, 0 without a label, ``[B, S]``."""
    logits = model(**batch.model_inputs()).logits
    losses = F.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=NO_LABEL
    )
    return losses.view_as(batch.labels)


def alone(model, batch: Batch):
    """The same loss, one document at a time."""
    found = torch.zeros(batch.labels.shape, dtype=next(model.parameters()).dtype)
    for row, positions in enumerate(batch.position_ids):
        begins = [*(positions == 0).nonzero().flatten().tolist(), LENGTH]
        for begin, end in pairwise(begins):
            part = (slice(row, row + 1), slice(begin, end))
            found[part] = costs(model, Batch(batch.input_ids[part], batch.labels[part]))
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_a_document_has_the_same_loss_in_a_packed_row_and_alone(attention, rows):
    # Some documents are long enough to be sparse, and longer than the budget.
    lengths = torch.randint(2, 140, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    text = documents(lengths)
    text = type(text)((text.tokens % 251).to(torch.uint8), text.starts)
    batch = PackedSampler(text, LENGTH, seed=0, name="a").batch(range(rows))
    assert (batch.position_ids.max(1).values > ATTENTION.dense_len).any()
    torch.manual_seed(0)
    model = build_model(ModelSettings(tiny=TINY), LENGTH).eval()
    exact = build_model(ModelSettings(tiny=TINY), LENGTH).double().eval()
    exact.load_state_dict(model.state_dict())
    kind = stage(attention=attention, max_length=LENGTH)
    with (
        torch.no_grad(),
        stage_attention(model, kind, ATTENTION),
        stage_attention(exact, kind, ATTENTION),
    ):
        assert_within_rounding(costs(model, batch), alone(exact, batch), alone(model, batch))
