"""The error of unusable training text."""

from __future__ import annotations


class DataError(ValueError):
    """The text is missing, damaged or too short; the message says what to do."""
