"""Training on several processes: their ranks, sharded weights and context parallelism."""

from infllm_flex.training.parallel.world import (
    World,
    check_processes,
    is_first_process,
    num_processes,
    open_world,
    pick_device,
    was_restarted,
)

__all__ = [
    "World",
    "check_processes",
    "is_first_process",
    "num_processes",
    "open_world",
    "pick_device",
    "was_restarted",
]
