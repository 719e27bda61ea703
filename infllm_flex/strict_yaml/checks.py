"""Checks for the ``__post_init__`` of settings, with messages that `build_dataclass` can locate."""

from __future__ import annotations


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Check that a setting lies between ``low`` and ``high``, both inclusive.

    Args:
        name: Name of the field.
        value: Its value.
        low: Smallest allowed value.
        high: Largest allowed value.

    Raises:
        ValueError: It lies outside; the message begins with the name.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
