"""Silence libraries that warn about things unrelated to a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Let loggers report errors only, for the block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Import transformers with progress bars and unrelated warnings off.

    transformers imports torchao on first use, which warns about every kernel meant for other
    hardware.
    """
    import transformers

    bars = transformers.utils.logging
    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with quiet_loggers("torchao", "torch.utils._pytree"):
            yield transformers
    finally:
        if had_bars:
            bars.enable_progress_bar()
