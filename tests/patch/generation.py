"""Generation with settings under which a wrong selection would show."""

import torch

from tests.patch.models import SETTINGS

# 48 tokens are fewer than the five blocks of the budget. Up to there sparse attention is dense, so
# positions that a short prompt attended densely equal those of a full forward, where all are
# sparse. Two of the five blocks are chosen by score: stale compressed keys would choose others.
GROWING = {**SETTINGS, "dense_len": 48}
OPTIONS = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 40}


def generate(model, ids, **options):
    """The tokens of a prompt and of its greedy continuation."""
    torch.manual_seed(0)
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **{**OPTIONS, **options})
