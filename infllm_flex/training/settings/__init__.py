"""The settings of a training run, one frozen dataclass per section of its YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field

from infllm_flex.config import InfLLMConfig
from infllm_flex.training.settings.data import STDLIB, DataSettings, has_rows
from infllm_flex.training.settings.model import (
    ModelSettings,
    TinyModelSettings,
    check_llama_sizes,
)
from infllm_flex.training.settings.parallel import MemorySettings, ParallelSettings
from infllm_flex.training.settings.run import (
    CheckpointSettings,
    CompareSettings,
    LogSettings,
    RunSettings,
)
from infllm_flex.training.settings.selection_loss import SelectionLossSettings
from infllm_flex.training.settings.stage import OptimSettings, StageSettings
from infllm_flex_ops.sizes import ceil_div

__all__ = [
    "STDLIB",
    "CheckpointSettings",
    "CompareSettings",
    "DataSettings",
    "LogSettings",
    "MemorySettings",
    "ModelSettings",
    "OptimSettings",
    "ParallelSettings",
    "RunSettings",
    "SelectionLossSettings",
    "StageSettings",
    "TinyModelSettings",
    "TrainingSettings",
    "check_llama_sizes",
    "has_rows",
]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """All settings of a run, as ``scripts/finetune.py`` reads them from one YAML file.

    Attributes:
        run: Folder, seed and device.
        model: The model to train.
        stages: The stages of the training by name, in order.
        attention: The attention of the sparse stages.
        data: The text.
        optim: The optimizer.
        parallel: Sharding and context parallelism.
        memory: Recomputation and offloading.
        checkpoint: When to save.
        log: When to write metrics.
        compare: Read by ``scripts/quickstart`` only.
    """

    run: RunSettings
    model: ModelSettings
    stages: dict[str, StageSettings]
    attention: InfLLMConfig = field(default_factory=InfLLMConfig)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must name at least one stage, got none")
        if self.data.packing == "stream":
            for name, stage in self.stages.items():
                if stage.length_buckets:
                    raise ValueError(
                        f"data must have packing: documents, because stages.{name} has "
                        "length_buckets"
                    )
        for name, stage in self.stages.items():
            if stage.selection_loss:
                self._check_selection_loss(name, stage)
        if self.memory.cpu_offload and self.parallel.kind == "ddp":
            raise ValueError(
                "memory must have cpu_offload: false with parallel.kind ddp: set parallel.kind to "
                "fsdp to offload"
            )

    def _check_selection_loss(self, name: str, stage: StageSettings) -> None:
        if self.parallel.context > 1:
            raise ValueError(
                f"parallel must have context: 1, because stages.{name} has selection_loss, which "
                f"needs whole sequences; got {self.parallel.context}"
            )
        attention = self.attention
        forced = attention.init_blocks + attention.local_blocks + 1
        blocks = ceil_div(stage.max_length, attention.block_size)
        if blocks < forced + 2:
            raise ValueError(
                f"stages must have a max_length of more than {forced + 1} blocks of "
                f"attention.block_size = {attention.block_size} tokens where they have "
                f"selection_loss, so that there are two blocks to choose between; stages.{name} "
                f"has {stage.max_length}"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages.values())
