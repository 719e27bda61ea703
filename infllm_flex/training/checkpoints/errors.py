"""The error of unusable checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint, or every checkpoint of a folder, cannot be used; the message says why."""
