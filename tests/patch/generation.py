"""Generation with settings under which a wrong selection would show."""

import torch
from transformers import DynamicCache, StaticCache

from tests.patch.models import CACHE, SETTINGS

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


def new_cache(model, kind):
    """A cache that grows, or one of 180 slots."""
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=180)


def in_parts(model, ids, mask, sizes, kind="dynamic"):
    """Logits of a batch that comes in parts, ``[B, S, V]``."""
    cache, out, end = new_cache(model, kind), [], 0
    for part in ids.split(sizes, 1):
        end += part.shape[1]
        kwargs = {} if mask is None else {"attention_mask": mask[:, :end]}
        if mask is not None and model.config.model_type == "gpt2":  # as generate() passes them
            own = (mask[:, :end].cumsum(1) - 1).clamp(min=0)
            kwargs["position_ids"] = own[:, -part.shape[1] :]
        out.append(model(part, **{CACHE: cache}, **kwargs).logits)
    return torch.cat(out, 1)
