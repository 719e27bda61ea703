"""What settings have in common."""

from __future__ import annotations

LARGEST_COUNT = 2**31 - 1


def check_range(settings: object, name: str, low: int, high: int) -> None:
    """Refuse a setting outside of ``low`` to ``high``, both inclusive, by its name."""
    value = getattr(settings, name)
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
