"""Actions that wait for the first configuration of a MiniCPM: the registration of its model.

transformers must know the model before one is built, and importing the model takes seconds, which
many processes that import infllm_flex, or read a configuration of another model, need not spend.
The configuration therefore announces itself here, and the package says what to do then: the model
imports the configuration, which cannot import the model.
"""

from __future__ import annotations

from collections.abc import Callable

_actions: list[Callable[[], None]] = []


def before_config(action: Callable[[], None]) -> None:
    """Call ``action`` before any MiniCPM configuration is made.

    Args:
        action: Takes no argument, and does nothing when it is called again.
    """
    _actions.append(action)


def announce_config() -> None:
    """Call the actions that wait for a configuration, which is about to be made."""
    for action in _actions:
        action()
