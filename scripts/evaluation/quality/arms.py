"""The models that are trained, and the attention that each is evaluated with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evaluation.controls import nearest_only
from evaluation.quality.random_blocks import RandomBlocks
from evaluation.quality.settings import QualitySettings
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import LayerAttend, attend_through, patch_model, unpatch_model
from infllm_flex.training.settings import SelectionLossSettings

DENSE, WINDOW, RANDOM = "dense", "window", "random"


@dataclass(frozen=True)
class AttentionMode:
    """An attention mode of a model.

    Attributes:
        name: Name of the variant, or ``dense``, ``window``, ``random``.
        attention: Its settings; None: dense.
        selection_loss: The training signal for its selection; None: none.
    """

    name: str
    attention: InfLLMConfig | None
    selection_loss: SelectionLossSettings | None = None

    @property
    def attend(self) -> LayerAttend | None:
        """The attention that replaces the settings' own selection; None: nothing does."""
        if self.name != RANDOM or self.attention is None:
            return None
        return RandomBlocks(self.attention)

    def visible(self, length: int) -> int:
        """Return the largest number of tokens that a query sees."""
        return length if self.attention is None else self.attention.max_visible(length)

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Patch a model with this attention inside the block."""
        if self.attention is None:
            yield
            return
        patch_model(model, self.attention)
        try:
            if self.attend is None:
                yield
            else:
                with attend_through(model, self.attend, leave_others=True):
                    yield
        finally:
            unpatch_model(model)


@dataclass(frozen=True)
class Arm:
    """A model with the attention that it is evaluated with.

    Attributes:
        tuned: Name of the attention mode in training; that of evaluation where nothing is trained.
        run: Name of the attention mode in evaluation.
    """

    tuned: str
    run: str

    @property
    def name(self) -> str:
        """The name in tables."""
        return self.tuned if self.tuned == self.run else f"{self.tuned}->{self.run}"


def attention_modes(settings: QualitySettings) -> dict[str, AttentionMode]:
    """Return all attention modes by name; the controls see as many tokens as one variant."""
    control = _without_scores(settings.control_attention)
    found = [
        AttentionMode(DENSE, None),
        AttentionMode(WINDOW, nearest_only(control)),
        AttentionMode(RANDOM, control),
    ]
    found += [
        AttentionMode(name, variant.attention, variant.selection_loss)
        for name, variant in settings.variants.items()
    ]
    return {mode.name: mode for mode in found}


def _without_scores(attention: InfLLMConfig) -> InfLLMConfig:
    """Return settings with the same blocks and cheap scores, which the controls do not use."""
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
        dense_by=attention.dense_by,
        engine=attention.engine,
    )


def trained(settings: QualitySettings) -> list[str]:
    """Return the names of the attention modes that a model is trained with."""
    if settings.tuning is None:
        return []
    names = [name for name, variant in settings.variants.items() if variant.trained]
    return [DENSE, *names, *([WINDOW, RANDOM] if names else [])]


def arms(settings: QualitySettings) -> list[Arm]:
    """Return all arms in the order of tables; without tuning, the base in each attention mode."""
    names = trained(settings)
    variants = settings.variants.items()
    free = [name for name, variant in variants if variant.training_free]
    if settings.tuning is None:
        return [Arm(name, name) for name in (DENSE, *free, WINDOW, RANDOM)]
    found = [Arm(name, name) for name in names]
    found += [Arm(DENSE, name) for name in free]
    found += [Arm(DENSE, control) for control in (WINDOW, RANDOM) if free]
    found += [
        Arm(name, DENSE) for name, variant in variants if variant.back_to_dense and name in names
    ]
    return found
