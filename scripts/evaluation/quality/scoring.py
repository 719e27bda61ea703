"""Predictions of a model, with the logits of only a part of a sequence in memory at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.quality.rows import Row
from infllm_flex.training.loss import head_of
from infllm_flex.training.model import load_model

_LOGITS_AT_ONCE = 2**26


def _weights_dtype(folder: Path, device: torch.device) -> torch.dtype:
    described = json.loads((folder / "config.json").read_text())
    saved = described.get("dtype", described.get("torch_dtype"))  # the latter before transformers 5
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return half.get(saved, torch.float32) if device.type == "cuda" else torch.float32


class Scorer:
    """A model whose next-token predictions are scored.

    Products are in bfloat16 on a GPU. Weights are in float32, as in training; on a GPU those of a
    model that was saved in bfloat16 or float16 stay so.

    Args:
        folder: Folder of the model.
        device: Device of the model.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model: Any = load_model(folder, _weights_dtype(folder, device)).to(device).eval()
        self.device = device
        self._head = head_of(self.model)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Disable gradients, and enable autocast on a GPU."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, self.is_half):
            yield

    @property
    def is_half(self) -> bool:
        """Whether products are computed in bfloat16."""
        return self.device.type == "cuda"

    def answers(self, rows: list[Row]) -> list[list[bool]]:
        """Tell for each question of each row whether every token of the answer is the likeliest."""
        ids = torch.stack([row.tokens for row in rows]).to(self.device)
        marks = torch.stack([row.is_answer() for row in rows])
        with self.arithmetic():
            outputs = self.model.get_decoder()(input_ids=ids[:, :-1], use_cache=False)
            asked = marks[:, 1:].to(self.device)
            found = self._logits(outputs, outputs.last_hidden_state[asked]).argmax(-1)
        right = torch.zeros_like(asked)
        right[asked] = found == ids[:, 1:][asked]
        right = right.cpu()
        # Token t is predicted at position t - 1.
        return [
            [bool(right[n, q.answer.start - 1 : q.answer.end - 1].all()) for q in row.questions]
            for n, row in enumerate(rows)
        ]

    def nats(self, windows: Tensor) -> Tensor:
        """Return the loss of every token but the first: float32 ``[N, S]`` of ``[N, S + 1]``."""
        return self.nats_and_hits(windows)[0]

    def nats_and_hits(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of `nats`, and whether each token is the likeliest, bool ``[N, S]``."""
        ids = windows.to(self.device)
        costs, hits = [], []
        with self.arithmetic():
            outputs = self.model.get_decoder()(input_ids=ids[:, :-1], use_cache=False)
            hidden, goals = outputs.last_hidden_state.flatten(0, 1), ids[:, 1:].flatten()
            rows = max(1, _LOGITS_AT_ONCE // self.model.config.vocab_size)
            for some, some_goals in zip(hidden.split(rows), goals.split(rows), strict=True):
                logits = self._logits(outputs, some)
                costs.append(F.cross_entropy(logits, some_goals, reduction="none"))
                hits.append(logits.argmax(-1) == some_goals)
        shape = (len(ids), -1)
        return torch.cat(costs).view(shape).cpu(), torch.cat(hits).view(shape).cpu()

    def _logits(self, outputs: Any, hidden: Tensor) -> Tensor:
        given = type(outputs)(last_hidden_state=hidden[None])
        return self._head(inputs_embeds=given, use_cache=False).logits[0].float()
