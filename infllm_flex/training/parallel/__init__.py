"""One training over many processes: who does what, and how weights and sequences are cut."""

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
