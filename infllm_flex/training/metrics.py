"""Progress reports of a run: a progress bar, and a file with one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsFile:
    """``metrics.jsonl``, truncated to the step that a run is resumed from.

    Args:
        path: The file; created if missing.
        done: Finished steps. Lines of later steps, written before an interruption, are removed.
        board: Folder for TensorBoard events with the same values. Ignored if TensorBoard is not
            installed.
    """

    def __init__(self, path: Path, done: int, board: Path | None = None) -> None:
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= done]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a")
        self._board = None if board is None else _open_tensorboard(board, done)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line and flush it."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _open_tensorboard(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done + 1)


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    # A crash can leave an incomplete last line.
    return [line for line in lines if line.startswith("{") and line.endswith("}")]


class Progress:
    """A progress bar over the steps of a run with the loss, the speed and the remaining time.

    Args:
        title: Label of the bar.
        total: Steps of the whole run.
        done: Steps finished before.
        unit: Unit of a token, for the bits of the loss.
        show: Whether to draw the bar.
    """

    def __init__(self, title: str, total: int, done: int, unit: str, show: bool = True) -> None:
        self._bar: Any = None
        self._unit = unit
        self._tokens, self._started = 0, time.perf_counter()
        if not show:
            return
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit="step",
            dynamic_ncols=terminal,
            ncols=None if terminal else 110,
            mininterval=0.2 if terminal else 15,  # few lines in a log file
            file=sys.stderr,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def tokens_per_second(self) -> float:
        """Average since the last `restart`."""
        return self._tokens / max(time.perf_counter() - self._started, 1e-9)

    def restart(self) -> None:
        """Restart the speed measurement, for example at a new stage."""
        self._tokens, self._started = 0, time.perf_counter()

    def advance(self, loss: float, tokens: int) -> None:
        """Count a step.

        Args:
            loss: Mean loss over its tokens, in nats.
            tokens: Number of its tokens.
        """
        self._tokens += tokens
        if self._bar is not None:
            bits = loss / math.log(2)
            text = f"{bits:.2f} bits/{self._unit}, {self.tokens_per_second:,.0f} tokens/s"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
