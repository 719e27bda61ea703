"""Correctness checks of a pair of models, before anything of it is timed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarking.correctness import IncorrectError, check_operators
from benchmarking.settings import BenchmarkSettings, CaseSettings, Heads, ShapeSettings
from benchmarking.settings import RunSettings as OperatorRun
from benchmarking.whole_models.pairs import Pair
from benchmarking.whole_models.runs import Decoder, filled_cache
from benchmarking.whole_models.settings import ModelCase, RunSettings
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import UnsupportedModelError, describe, patch_model

_ROUNDINGS = 4  # of the dtype, relative to the size of an attention layer's output


def attention_of(model: Any) -> InfLLMConfig:
    """Return the settings of a patched model.

    Raises:
        UnsupportedModelError: A layer stays dense.
    """
    rows = describe(model)
    for row in rows:
        if row.config is None:
            raise UnsupportedModelError(f"{row.name} stays dense: {row.status}")
    return next(row.config for row in rows if row.config is not None)


def check_pair(run: RunSettings, pair: Pair) -> None:
    """Check selection and attention at the shape of a model, and its way into the model.

    The operators are compared with the float64 reference. The patched model is compared with the
    dense one where every block is selected: a prompt, and a step over each kind of cache.

    Raises:
        IncorrectError: A result is wrong; nothing should be timed.
        UnsupportedModelError: A layer stays dense.
    """
    original = attention_of(pair.sparse)
    config = dataclasses.replace(original, dense_len=-1)
    heads = Heads(pair.shape.num_heads, pair.shape.num_kv_heads)
    check_operators(
        BenchmarkSettings(
            run=OperatorRun(out=Path("unused.csv"), device=run.device, dtype=run.dtype),
            shapes=ShapeSettings(heads=(str(heads),), head_dim=pair.shape.head_dim),
            cases={
                "prompt": CaseSettings(lengths=(1,), mode="forward+backward"),
                "step": CaseSettings(lengths=(1,), mode="decode"),
            },
            attention=config,
            engines=(cast(Any, config.engine),),
        ),
        heads,
    )
    patch_model(pair.sparse, config)
    try:
        _check_model(run, pair, config)
    finally:
        patch_model(pair.sparse, original)


@torch.no_grad()
def _check_model(run: RunSettings, pair: Pair, config: InfLLMConfig) -> None:
    length = config.num_selected * config.block_size - config.block_size
    embeds = pair.embeddings(1, length, run.seed)
    outputs = []
    for model in (pair.dense, pair.sparse):
        with attention_outputs(model, pair) as seen:
            model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1)
        outputs.append(seen)
    _compare("a prompt", *outputs)
    for phase in ("decode", "decode_static"):
        case = ModelCase(phase=phase, lengths=(length,))
        outputs = []
        for model in (pair.dense, pair.sparse):
            cache = filled_cache(model, case, pair, length, 8, run.seed)
            Decoder(model, model, cache, case.batch).steps(1)  # takes in the whole cache
            with attention_outputs(model, pair) as seen:
                # The same token for both models: their likeliest ones may differ by rounding.
                Decoder(model, model, cache, case.batch).steps(1)
            outputs.append(seen)
        _compare(f"a step of {phase}", *outputs)


@contextlib.contextmanager
def attention_outputs(model: Any, pair: Pair) -> Iterator[list[Tensor]]:
    """Record the outputs of the attention layers, in order, inside the block."""
    seen: list[Tensor] = []
    names = [row.name for row in describe(pair.sparse)]
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, out: seen.append(out[0])
        )
        for name in names
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _compare(what: str, dense: list[Tensor], sparse: list[Tensor]) -> None:
    """Compare layer by layer; differences of earlier layers add up like random numbers."""
    eps = max(torch.finfo(dense[0].dtype).eps, 1e-5)  # float32: sums of another order
    for layer, (expected, actual) in enumerate(zip(dense, sparse, strict=True)):
        difference = (actual.double() - expected.double()).norm()
        error = (difference / expected.double().norm()).item()
        limit = _ROUNDINGS * eps * (1 + layer) ** 0.5
        if not error <= limit:
            raise IncorrectError(
                f"{what} with every block selected: attention layer {layer} differs from dense by "
                f"{error:.3g}, allowed {limit:.3g}"
            )
