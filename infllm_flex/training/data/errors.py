"""What can be wrong with the text."""

from __future__ import annotations


class DataError(ValueError):
    """The text is not there, is damaged, or there is not enough of it."""
