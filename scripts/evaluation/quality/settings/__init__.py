"""Settings of ``scripts/quality.py``: one frozen dataclass per section of its YAML file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from evaluation.quality.settings.base import BaseSettings
from evaluation.quality.settings.judge import JudgeSettings
from evaluation.quality.settings.text import PYTHON, TextSettings
from evaluation.quality.settings.tuning import TuningSettings
from infllm_flex.config import InfLLMConfig
from infllm_flex.training.settings import SelectionLossSettings

__all__ = [
    "PYTHON",
    "RESERVED",
    "BaseSettings",
    "JudgeSettings",
    "QualitySettings",
    "RunSettings",
    "TextSettings",
    "TuningSettings",
    "VariantSettings",
]

RESERVED = ("dense", "window", "random")

_RULER_ANSWER = 128  # tokens by which RULER's prompts may be shorter than their length

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Folder, seeds, device and outputs.

    Attributes:
        folder: Folder of base, text, models and results; several processes may share it.
        seeds: Seeds of training and evaluation; every variant is trained once for each.
        device: ``auto``: a GPU if there is one.
        table: The CSV to write.
        plot: The picture to write.
        commit: Value of the column ``commit``; empty: the checkout's.
    """

    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    table: Path = Path("runs/results/quality.csv")
    plot: Path = Path("runs/results/quality.png")
    commit: str = ""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds must be at least one number from 0 on, none twice, got {list(self.seeds)}"
            )


@dataclass(frozen=True, kw_only=True)
class VariantSettings:
    """A sparse attention to judge.

    Attributes:
        attention: Its settings.
        trained: Whether to train a model with it and judge that model.
        training_free: Whether to judge it on the model that was trained densely.
        back_to_dense: Whether to judge the model that was trained with it densely, too.
        selection_loss: The training signal for its selection, as in a stage of fine-tuning; None:
            none.
    """

    attention: InfLLMConfig
    trained: bool = True
    training_free: bool = True
    back_to_dense: bool = False
    selection_loss: SelectionLossSettings | None = None

    def __post_init__(self) -> None:
        if self.selection_loss and not self.trained:
            raise ValueError("selection_loss must be left out where trained is false")
        if not self.trained and not self.training_free:
            raise ValueError("trained or training_free must be true, else nothing is judged")


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """All settings of ``scripts/quality.py``.

    Attributes:
        run: Folder, seeds, device and outputs.
        base: The pretrained model.
        text: The text.
        tuning: Training of the variants; None: nothing is trained, and the base is judged as it is.
        variants: The sparse attentions by name.
        control: Name of the variant whose budget the controls have, which are a window and random
            blocks; None: the first variant.
        judge: Evaluation.
    """

    run: RunSettings
    base: BaseSettings
    variants: dict[str, VariantSettings]
    tuning: TuningSettings | None = None
    text: TextSettings = field(default_factory=TextSettings)
    control: str | None = None
    judge: JudgeSettings = field(default_factory=JudgeSettings)

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("variants must name at least one sparse attention, got none")
        for name in self.variants:
            if not _NAME.fullmatch(name) or name in RESERVED:
                raise ValueError(
                    "variants must have names of small letters, digits and _, which begin with a "
                    f"letter and differ from {', '.join(RESERVED)}; got {name!r}"
                )
        if self.tuning is None and self.judge.length is None:
            raise ValueError("judge.length must be given where tuning, and so its length, is not")
        if self.tuning is None and not any(one.training_free for one in self.variants.values()):
            raise ValueError("variants must have one with training_free where tuning is not given")
        if self.control is not None and self.control not in self.variants:
            raise ValueError(f"control must be one of the variants, got {self.control!r}")
        for name, variant in self.variants.items():
            self._check_sparse(name, variant)

    def _check_sparse(self, name: str, variant: VariantSettings) -> None:
        """Refuse a variant that is dense attention where it is trained or judged.

        Raises:
            ValueError: Names the variant and the length.
        """
        groups, attention = set(self.judge.groups), variant.attention
        tokens = {"judge.length": self.length} if groups - {"ruler"} else {}
        if self.tuning is not None and variant.trained:
            tokens["tuning.length"] = self.tuning.length
        if "ruler" in groups:
            tokens["judge.ruler_lengths"] = min(self.judge.ruler_lengths) - _RULER_ANSWER
        for key, length in tokens.items():
            if attention.max_visible(length) >= length:
                raise ValueError(
                    f"variants.{name}: a query must see a part of the sequence, with dense_len = "
                    f"{attention.dense_len} and {attention.budget_tokens} visible tokens it sees "
                    f"all {length} tokens of {key}: lower dense_len or topk, or make sequences "
                    "longer"
                )

    @property
    def length(self) -> int:
        """Tokens of a sequence in evaluation."""
        if self.judge.length is not None:
            return self.judge.length
        assert self.tuning is not None  # checked above
        return self.tuning.length

    @property
    def questions(self) -> int:
        """Largest number of questions at the end of a sequence."""
        if self.judge.questions is not None:
            return self.judge.questions
        return TuningSettings.questions if self.tuning is None else self.tuning.questions

    @property
    def control_attention(self) -> InfLLMConfig:
        """The settings whose budget the controls have."""
        return self.variants[self.control or next(iter(self.variants))].attention
