"""From one integer, the number of steps done, to the stage, its step and the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from infllm_flex.training.settings import StageSettings


@dataclass(frozen=True)
class Position:
    """A step within the stages of a run.

    Attributes:
        name: The stage.
        stage: Its settings.
        step: Steps of this stage done before, from 0.
    """

    name: str
    stage: StageSettings
    step: int

    @property
    def learning_rate(self) -> float:
        """The learning rate of this step: linear rise, plateau, linear fall."""
        stage = self.stage
        rise = (self.step + 1) / (stage.warmup_steps + 1)
        fall = (stage.steps - self.step) / (stage.decay_steps + 1)
        return stage.learning_rate * min(1.0, rise, fall)

    def sample_indices(self) -> range:
        """The samples of this step, counted from the start of the stage."""
        first = self.step * self.stage.batch_size
        return range(first, first + self.stage.batch_size)


def position_of(stages: dict[str, StageSettings], done: int) -> Position | None:
    """Where a run stands after ``done`` steps; None when it is complete."""
    for name, stage in stages.items():
        if done < stage.steps:
            return Position(name, stage, done)
        done -= stage.steps
    return None
