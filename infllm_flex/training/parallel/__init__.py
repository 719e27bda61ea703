"""One training over many processes: who does what, and how weights and sequences are cut."""

from infllm_flex.training.parallel.world import World, is_first_process, open_world

__all__ = ["World", "is_first_process", "open_world"]
