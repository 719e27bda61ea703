"""Try the functions of other packages; where one cannot be timed, give the reason."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from benchmarking.correctness import IncorrectError

T = TypeVar("T")


class UnavailableError(Exception):
    """A package cannot be tried; the message begins with the word for its cell."""


def attempt(run: Callable[[], T]) -> tuple[T | None, str]:
    """Run something that may not work here.

    Args:
        run: Prepares a package's function, checks it, and returns what can be timed.

    Returns:
        The result and ``""``, or None and the reason. A reason is a word, a colon and the rest:
        ``not installed``, ``wrong version``, ``not supported``, ``out of memory`` or ``wrong``.
    """
    try:
        return run(), ""
    except UnavailableError as error:
        return None, str(error)
    except IncorrectError as error:
        return None, f"wrong: {error}"
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except (ImportError, AttributeError, TypeError) as error:
        return None, f"wrong version: {_line(error)}"
    except Exception as error:  # compiled packages raise whatever they like
        return None, f"not supported: {_line(error)}"


def import_installed(*names: str) -> Any:
    """Import the first of some modules whose package is installed.

    Raises:
        UnavailableError: None is installed.
    """
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return importlib.import_module(name)
    raise UnavailableError(f"not installed: {names[0].partition('.')[0]}")


def _line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
