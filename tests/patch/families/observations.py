"""Results of a model for a batch, as lists of tensors that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import infllm_flex as ifx
from tests.patch.families.tiny import FIRST_SPECIAL
from tests.patch.models import CACHE, LONG, SHORT

Tensors = list[Tensor]
Observation = Callable[[PreTrainedModel], Tensors]
# float32 through two to four layers of large random weights. A wrong block is off by over 1e-2.
TOLERANCE = 3e-4


def tokens(model: PreTrainedModel, length: int, batch: int = 2) -> Tensor:
    """``[batch, length]`` token ids without special ones; a row per codebook where there are."""
    random = torch.Generator().manual_seed(length)
    return torch.randint(4, FIRST_SPECIAL, (batch * _rows(model), length), generator=random)


def _rows(model: PreTrainedModel) -> int:
    """Rows of token ids per sequence: one per codebook of a MusicGen, else one."""
    musicgen = type(model).__name__.startswith("Musicgen")
    return model.config.num_codebooks if musicgen else 1


def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of one forward without gradients."""
    with torch.no_grad():
        return model(ids, **kwargs).logits


def training(model: PreTrainedModel, ids: Tensor, real: Tensor | None = None) -> Tensors:
    """Logits and the gradients of all parameters, of real tokens only."""
    model.train()
    model.zero_grad()
    mask = {} if real is None else {"attention_mask": real.long()}
    out = model(ids, use_cache=False, **mask).logits
    kept = out if real is None else _real_only(out, real)
    random = torch.Generator().manual_seed(0)
    (kept * torch.randn(kept.shape, generator=random)).mean().backward()
    model.eval()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [kept.detach(), *gradients]


def _real_only(out: Tensor, real: Tensor) -> Tensor:
    return out[real.repeat_interleave(len(out) // len(real), 0)]


def padding(length: int, shorter: int, left: bool) -> Tensor:
    """bool ``[2, length]``: a whole row, and one padded to it."""
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, slice(None, length - shorter) if left else slice(shorter, None)] = False
    return real


def padded_below(left: bool) -> Observation:
    """Logits of a padded batch, padding included."""
    options = {"attention_mask": padding(SHORT, 60, left).long(), "use_cache": False}
    return lambda model: [logits(model, tokens(model, SHORT), **options)]


def padded_across(left: bool) -> Observation:
    """Training on a padded batch of a sparse and a dense row."""
    real = padding(LONG, 70, left)
    return lambda model: training(model, tokens(model, LONG), real)


def in_chunks(*sizes: int, left: int = 0) -> Observation:
    """Logits of a prefill and the calls after it, over a cache; the second row padded left."""

    def observe(model: PreTrainedModel) -> Tensors:
        ids = tokens(model, sum(sizes))
        real = padding(sum(sizes), sum(sizes) - left, left=True)
        outs, done = [], 0
        state: dict[str, Any] = {}
        for size in sizes:
            if left:
                state["attention_mask"] = real[:, : done + size].long()
            with torch.no_grad():
                out = model(ids[:, done : done + size], use_cache=True, **state)
            cache = getattr(out, CACHE)
            assert cache is not None, "no cache"
            state[CACHE] = cache
            chunk = real[:, done : done + size]
            outs.append(_real_only(out.logits, chunk) if left else out.logits)
            done += size
        return outs

    return observe


def generation(length: int, new: int, left: bool = False) -> Observation:
    """Greedy tokens and their logits."""

    def observe(model: PreTrainedModel) -> Tensors:
        ids = tokens(model, length)
        mask = padding(length, length - 9, left=True).long() if left else torch.ones_like(ids)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        return [out.sequences, *out.logits]

    return observe


def packed(lengths: tuple[int, ...], by_bounds: bool, use_cache: bool = False) -> Observation:
    """Logits of documents in one row, each its own tensor."""

    def observe(model: PreTrainedModel) -> Tensors:
        ids = tokens(model, sum(lengths), batch=1)
        kwargs = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
        if by_bounds:
            bounds = torch.tensor([0, *lengths]).cumsum(0).int()
            kwargs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
            kwargs |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
        out = logits(model, ids, use_cache=use_cache, **kwargs)
        return list(out.split(lengths, dim=1))

    return observe


def alone(lengths: tuple[int, ...]) -> Observation:
    """Logits of the documents of `packed`, each in a call of its own."""

    def observe(model: PreTrainedModel) -> Tensors:
        documents = tokens(model, sum(lengths), batch=1).split(lengths, dim=1)
        positions = [torch.arange(n)[None] for n in lengths]
        return [
            logits(model, ids, use_cache=False, position_ids=p)
            for ids, p in zip(documents, positions, strict=True)
        ]

    return observe


def block_diagonal(lengths: tuple[int, ...]) -> Observation:
    """Logits of the documents of `packed`, by a mask of four axes in the unpatched model."""

    def observe(model: PreTrainedModel) -> Tensors:
        ids = tokens(model, sum(lengths), batch=1)
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        seen = (document[:, None] == document) & torch.ones(len(ids[0]), len(ids[0])).tril().bool()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        out = logits(
            model, ids, use_cache=False, position_ids=positions, attention_mask=mask[None, None]
        )
        return list(out.split(lengths, dim=1))

    return observe


def in_whole(*sizes: int) -> Observation:
    """The logits of `in_chunks`, by one forward."""

    def observe(model: PreTrainedModel) -> Tensors:
        out = logits(model, tokens(model, sum(sizes)), use_cache=False)
        return list(out.split(sizes, dim=1))

    return observe


def padded_rows(left: bool) -> Observation:
    """Real tokens' logits of each row of a padded batch."""
    real = padding(LONG, 120, left)

    def observe(model: PreTrainedModel) -> Tensors:
        out = logits(model, tokens(model, LONG), use_cache=False, attention_mask=real.long())
        return [row[r] for row, r in zip(out[:: _rows(model)], real, strict=True)]

    return observe


def rows_alone(left: bool, at_their_slots: bool) -> Observation:
    """The same of each row in a call of its own, its positions those of its slots or from 0 on."""
    real = padding(LONG, 120, left)

    def observe(model: PreTrainedModel) -> Tensors:
        outs = []
        for row, r in zip(tokens(model, LONG).split(_rows(model)), real, strict=True):
            positions = {"position_ids": r.nonzero().T} if at_their_slots else {}
            outs.append(logits(model, row[:, r], use_cache=False, **positions)[0])
        return outs

    return observe


def as_unpatched(observe: Observation) -> Observation:
    """The same of a model whose recurrent or convolving layers know no documents unpatched."""

    def observe_hybrid(model: PreTrainedModel) -> Tensors:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        hashes = hasattr(config, "encoder_hash_byte_group_size")  # BLT: embeddings of n-grams
        if not hashes and not {"linear_attention", "conv", "hybrid"} & kinds:
            raise NotImplementedError("only attention mixes tokens")
        return observe(model)

    return observe_hybrid


def difference(ours: Tensors, theirs: Tensors, exact: bool) -> str | None:
    """How two observations differ, in words; None where they agree."""
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors where there were {len(theirs)}"
    # Some gradients are zero but for rounding, such as that of a bias that all keys share.
    floor = 1e-2 * max(
        (float(b.nan_to_num(0, 0, 0).abs().max()) for b in theirs if b.numel()), default=1
    )
    worst = 0.0
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            return f"shape {list(a.shape)} where it was {list(b.shape)} (tensor {index})"
        if not torch.equal(a.isfinite(), b.isfinite()):
            return f"not finite in other places (tensor {index})"
        a, b = a[b.isfinite()].double(), b[b.isfinite()].double()
        if a.numel() and not torch.equal(a, b):
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(floor)))
    if worst > (0 if exact else TOLERANCE):
        return f"off by {worst:.1e} of the largest"
    return None


def sparse_and_dense(model: PreTrainedModel) -> tuple[Tensors, Tensors]:
    """Logits of a patched model, as it is and inside `infllm_flex.dense`."""
    ids = tokens(model, LONG)
    ours = logits(model, ids, use_cache=False)
    with ifx.dense(model):
        return [ours], [logits(model, ids, use_cache=False)]
