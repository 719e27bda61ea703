"""The state that changes during training, saved to and restored from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_flex.training import checkpoints
from infllm_flex.training.collectives import on_first_rank, rank
from infllm_flex.training.data import Text, check_vocabulary
from infllm_flex.training.data.mixing import seed_of
from infllm_flex.training.layer_transforms import use_float8
from infllm_flex.training.loss import LanguageLoss
from infllm_flex.training.model import build_empty_model, build_model, config_json, decoder_layers
from infllm_flex.training.optim import Optimizers
from infllm_flex.training.parallel import World
from infllm_flex.training.parallel.wrap import wrap
from infllm_flex.training.schedule import position_of
from infllm_flex.training.settings import TrainingSettings
from infllm_flex.training.stage_attention import fit_positions


class TrainingState:
    """Weights, optimizer state and step count. Samplers derive their position from the step count.

    Args:
        settings: Settings of the run; its seed determines random weights.
        folder: The folder of the checkpoints.
        text: The training text.
        world: The processes of the run.

    Attributes:
        model: The model, in training mode.
        layers: The decoder layers of the model, in order.
        loss: The module that computes the loss, wrapped by FSDP or DDP.
        optimizers: Optimizers of the current stage.
        done: Number of finished steps.
        saved: Step of the newest checkpoint, -1 before the first.
    """

    def __init__(self, settings: TrainingSettings, folder: Path, text: Text, world: World) -> None:
        self._settings, self._folder, self._world = settings, folder, world
        self._text_identity = text.identity
        torch.manual_seed(settings.run.seed)
        first = next(iter(settings.stages.values()))
        build = build_model if world.is_first else build_empty_model
        self.model = build(settings.model, first.max_length)
        check_vocabulary(text, self.model.config.vocab_size)
        if settings.model.float8:
            use_float8(self.model, world.device)
        self.layers = decoder_layers(self.model)
        self.loss = wrap(
            LanguageLoss(self.model, settings.memory.logits_mib), self.layers, settings, world
        )
        self.optimizers = Optimizers(self.model, settings.optim)
        self.done, self.saved = 0, -1

    def enter_stage(self, name: str) -> None:
        """Prepare the model for a stage. At its first step, the optimizers start afresh."""
        stages, position = self._settings.stages, position_of(self._settings.stages, self.done)
        for earlier, stage in stages.items():
            fit_positions(self.model, earlier, stage.max_length, stage.rope_theta)
            if earlier == name:
                break
        if position and position.step == 0:
            self.optimizers = Optimizers(self.model, self._settings.optim)

    def restore(self) -> None:
        """Restore the newest checkpoint, if there is one.

        Raises:
            CheckpointError: All checkpoints are damaged, or the newest belongs to another run.
        """
        checkpoints.clear(self._folder)
        path = checkpoints.newest(self._folder)
        if path is None:
            return
        saved = checkpoints.read_state(path)
        if saved.text_identity != self._text_identity:
            raise checkpoints.CheckpointError(
                f"{path}: data.source has changed since this checkpoint was written: restore the "
                "original files, or start a new run from the exported model"
            )
        position = position_of(self._settings.stages, saved.step)
        optimizer: dict[str, Tensor] = {}
        if position and position.step:
            self.optimizers.materialise()
            optimizer = self.optimizers.tensors()
        random_state = self._random_state()
        if checkpoints.load(path, _weights(self.model), optimizer, random_state):
            torch.set_rng_state(random_state["cpu"])
            if "cuda" in random_state:
                torch.cuda.set_rng_state(random_state["cuda"], self._world.device)
        else:
            # Another number of processes wrote the checkpoint: derive new seeds.
            torch.manual_seed(seed_of(f"{self._settings.run.seed}/{saved.step}/{rank()}"))
        self.done = self.saved = saved.step

    def save(self) -> Path:
        """Write a checkpoint, unless one exists for this step.

        Returns:
            The folder of the checkpoint.
        """
        if self.saved == self.done:
            return checkpoints.path_of(self._folder, self.done)
        settings = self._settings
        position = position_of(settings.stages, self.done)
        sparse = any(stage.attention == "sparse" for stage in settings.stages.values())
        checkpoint = checkpoints.Checkpoint(
            step=self.done,
            text_identity=self._text_identity,
            weights=_weights(self.model),
            # The next stage starts with fresh optimizers, and a finished run needs none.
            optimizer=self.optimizers.tensors() if position and position.step else {},
            random_state=self._random_state(),
            config_json=config_json(self.model, settings.attention if sparse else None),
        )
        path = checkpoints.save(self._folder, checkpoint, settings.checkpoint.keep)
        self.saved = self.done
        return path

    def export(self, target: Path) -> Path:
        """Export the newest checkpoint as a model folder, unless ``target`` already is its export.

        Returns:
            ``target``.

        Raises:
            FileExistsError: ``target`` holds other files.
        """
        path = checkpoints.path_of(self._folder, self.saved)
        origin = self._settings.model.path
        on_first_rank(
            lambda: (
                checkpoints.is_export_of(target, path) or checkpoints.export(path, target, origin)
            )
        )
        return target

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._world.device)
        return state


def _weights(model: Any) -> dict[str, Tensor]:
    """The persistent tensors by name; tied weights under their first name only."""
    weights: dict[str, Tensor] = {}
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            weights[name] = value
    return weights
