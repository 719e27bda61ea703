"""Which models are trained, and which attention each is then run with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evaluation.quality.random_blocks import RandomBlocks
from evaluation.quality.settings import QualitySettings
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import LayerAttend, attend_through, patch_model, unpatch_model

DENSE, WINDOW, RANDOM = "dense", "window", "random"


@dataclass(frozen=True)
class Way:
    """A way to attend.

    Attributes:
        name: Of the variant, or ``dense``, ``window``, ``random``.
        attention: Its setting; None: dense.
    """

    name: str
    attention: InfLLMConfig | None

    @property
    def attend(self) -> LayerAttend | None:
        """What attends instead of the setting's own choice."""
        if self.name != RANDOM or self.attention is None:
            return None
        return RandomBlocks(self.attention)

    def visible(self, length: int) -> int:
        """Tokens that a query sees at most."""
        if self.attention is None or self.attention.is_dense(length):
            return length
        return min(length, self.attention.num_selected * self.attention.block_size)

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Let a model attend so for the block."""
        if self.attention is None:
            yield
            return
        patch_model(model, self.attention)
        try:
            if self.attend is None:
                yield
            else:
                with attend_through(model, self.attend):
                    yield
        finally:
            unpatch_model(model)


@dataclass(frozen=True)
class Arm:
    """A model as it was trained, and how it is run.

    Attributes:
        tuned: Name of the way it was trained.
        run: Name of the way it attends now.
    """

    tuned: str
    run: str

    @property
    def name(self) -> str:
        """As tables call it."""
        return self.tuned if self.tuned == self.run else f"{self.tuned}->{self.run}"


def ways(settings: QualitySettings) -> dict[str, Way]:
    """Every way by name; the controls see as many tokens as one of the variants."""
    control = _without_scores(settings.control_attention)
    # As few blocks as there can be beside the window: the first and the query's own.
    topk = control.init_blocks + 1
    size = (control.num_selected - topk) * control.block_size
    window = dataclasses.replace(control, topk=topk, window_size=size)
    found = [Way(DENSE, None), Way(WINDOW, window), Way(RANDOM, control)]
    found += [Way(name, variant.attention) for name, variant in settings.variants.items()]
    return {way.name: way for way in found}


def _without_scores(attention: InfLLMConfig) -> InfLLMConfig:
    """A setting with the blocks of another, and scores that cost little: no control heeds them."""
    block = attention.block_size
    stride = block // 4 if block % 4 == 0 else block
    return InfLLMConfig(
        kernel_size=2 * stride if stride < block else block,
        kernel_stride=stride,
        init_blocks=attention.init_blocks,
        block_size=block,
        window_size=attention.window_size,
        topk=attention.topk,
        dense_len=attention.dense_len,
        engine=attention.engine,
    )


def trained(settings: QualitySettings) -> list[str]:
    """Names of the ways that a model is trained with."""
    names = [name for name, variant in settings.variants.items() if variant.trained]
    return [DENSE, *names, *([WINDOW, RANDOM] if names else [])]


def arms(settings: QualitySettings) -> list[Arm]:
    """What is judged, in the order of tables."""
    found = [Arm(name, name) for name in trained(settings)]
    variants = settings.variants.items()
    free = [name for name, variant in variants if variant.training_free]
    found += [Arm(DENSE, name) for name in free]
    found += [Arm(DENSE, control) for control in (WINDOW, RANDOM) if free]
    found += [
        Arm(name, DENSE) for name, variant in variants if variant.trained and variant.back_to_dense
    ]
    return found
