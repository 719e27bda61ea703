"""Map the number of finished steps to the stage, the step within it and the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from infllm_flex.training.settings import StageSettings


@dataclass(frozen=True)
class Position:
    """A step within the stages of a run.

    Attributes:
        name: Name of the stage.
        stage: Settings of the stage.
        step: Index of the step within the stage, from 0.
    """

    name: str
    stage: StageSettings
    step: int

    @property
    def learning_rate(self) -> float:
        """The learning rate of this step: linear warm-up, plateau, linear decay."""
        stage = self.stage
        warmup = (self.step + 1) / (stage.warmup_steps + 1)
        decay = (stage.steps - self.step) / (stage.decay_steps + 1)
        return stage.learning_rate * min(1.0, warmup, decay)

    def sample_indices(self) -> range:
        """Indices of this step's samples, counted from the start of the stage."""
        start = self.step * self.stage.batch_size
        return range(start, start + self.stage.batch_size)


def position_of(stages: dict[str, StageSettings], done: int) -> Position | None:
    """The position of a run after ``done`` steps; None if the run is complete."""
    for name, stage in stages.items():
        if done < stage.steps:
            return Position(name, stage, done)
        done -= stage.steps
    return None
