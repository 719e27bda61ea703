#!/usr/bin/env python3
"""A GPT in plain PyTorch, trained densely on short text, then patched and trained on longer text.

    examples/plain_pytorch.py [--steps 20] [--length 1024]

`ifx.patch_model` takes any model that calls `F.scaled_dot_product_attention(is_causal=True)`. No
line of the model knows of it.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infllm_flex as ifx

WIDTH, QUERY_HEADS, KV_HEADS = 128, 4, 2
HEAD_DIM = WIDTH // QUERY_HEADS


class Attention(nn.Module):
    """Causal attention; two query heads share a head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to those before it; ``[B, S, WIDTH]``."""
        heads = self.qkv(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        query, key, value = heads.split([QUERY_HEADS, KV_HEADS, KV_HEADS], dim=1)
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer network, each added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.network = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; ``[B, S, WIDTH]``."""
        x = x + self.attention(self.norms[0](x))
        return x + self.network(self.norms[1](x))


class GPT(nn.Module):
    """A byte-level decoder with learned positions."""

    def __init__(self, num_layers: int, max_length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(max_length, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(num_layers)))
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next byte at every position: ``[B, S]`` to ``[B, S, 256]``."""
        positions = self.positions.weight[: tokens.shape[1]]
        return self.head(self.blocks(self.tokens(tokens) + positions))


def main() -> None:
    """Train a short model, then a long one."""
    options = parse_arguments()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(num_layers=2, max_length=options.length).to(device)
    text = read_text().to(device)
    train(model, text, options.length // 4, options.steps)

    # The one line that this example is about. The settings are small: 12 blocks of 16 bytes.
    ifx.patch_model(
        model, block_size=16, window_size=64, topk=8, dense_len=options.length // 2, engine="fused"
    )
    print(ifx.describe(model))
    train(model, text, options.length, options.steps)

    stretch = text[None, : options.length + 1]
    with torch.no_grad():
        print(f"sparse: loss {loss(model, stretch):.3f}")
        with ifx.dense(model):
            print(f"dense, the same weights: loss {loss(model, stretch):.3f}")
    ifx.unpatch_model(model)


def train(model: nn.Module, text: Tensor, length: int, steps: int) -> None:
    """Take ``steps`` steps on random stretches of ``length`` bytes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        starts = torch.randint(len(text) - length, (4,)).tolist()
        value = loss(model, torch.stack([text[s : s + length + 1] for s in starts]))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            print(f"{length} bytes, step {step + 1}: loss {value.item():.3f}")


def loss(model: nn.Module, stretches: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    logits = model(stretches[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten())


def read_text() -> Tensor:
    """Read modules of Python's standard library as bytes, int64 ``[N]``."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.tensor(list(b"".join(map(Path.read_bytes, files))[: 1 << 20]))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="of each of the two trainings")
    parser.add_argument("--length", type=int, default=1024, help="bytes of the longer sequences")
    return parser.parse_args()


if __name__ == "__main__":
    main()
