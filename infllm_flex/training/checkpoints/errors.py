"""What can be wrong with checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """There are checkpoints, but none that can be used."""
