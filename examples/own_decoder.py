#!/usr/bin/env python3
"""A decoder that keeps its own key cache: `ifx.CompressedKeys` and `ifx.decode_attention`.

    examples/own_decoder.py [--prompt 1000] [--new-tokens 64]

For an inference engine that has its own loop over layers and tokens. The prompt goes through
`ifx.infllm_attention`; each new token costs a look at the compressed keys and at its own blocks. No
shape depends on the number of tokens so far, so that one CUDA graph or one compiled graph can serve
every step.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infllm_flex as ifx

VOCABULARY, WIDTH, QUERY_HEADS, KV_HEADS = 256, 128, 4, 2
HEAD_DIM = WIDTH // QUERY_HEADS
# A token attends to 12 blocks of 16 tokens, once its sequence has 256 tokens.
CONFIG = ifx.InfLLMConfig(block_size=16, window_size=64, topk=8, dense_len=256, engine="fused")


class Layer(nn.Module):
    """Attention and a two-layer network, with a cache of keys and values allocated once."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.keys = torch.zeros(1, KV_HEADS, capacity, HEAD_DIM)
        self.values = torch.zeros_like(self.keys)
        self.compressed = ifx.CompressedKeys(CONFIG, self.keys)

    def forward(self, x: Tensor, length: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Take in the tokens after the first ``length``; ``x`` is ``[1, S, WIDTH]``."""
        end = length + x.shape[1]
        heads = self.qkv(F.rms_norm(x, (WIDTH,))).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        query, key, value = heads.split([QUERY_HEADS, KV_HEADS, KV_HEADS], dim=1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        self.keys[:, :, length:end] = key
        self.values[:, :, length:end] = value
        self.compressed.append(self.keys, x.shape[1])  # after the keys are in the cache
        if length == 0:
            attended = ifx.infllm_attention(query, key, value, CONFIG)
        else:
            attended = ifx.decode_attention(query, self.keys, self.values, self.compressed)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.rms_norm(x, (WIDTH,)))))


class Decoder(nn.Module):
    """Two layers with rotary positions, for one sequence."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(capacity) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        angles = torch.outer(
            torch.arange(capacity), 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1)[:-1]
        )
        self.cos, self.sin = angles.cos(), angles.sin()
        self.length = 0

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Take in the next tokens ``[1, S]``; returns the logits of the one after, ``[1, V]``."""
        x = self.tokens(tokens)
        positions = slice(self.length, self.length + tokens.shape[1])
        for layer in self.layers:
            x = layer(x, self.length, self.cos[positions], self.sin[positions])
        self.length += tokens.shape[1]
        return self.head(x[:, -1])

    def forget(self) -> None:
        """Begin another sequence in the same memory."""
        self.length = 0
        for layer in self.layers:
            layer.compressed.reset()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to ``[1, H, S, D]``, in halves."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def main() -> None:
    """Generate greedily, then check the last step against one pass over all tokens."""
    options = parse_arguments()
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = Decoder(capacity=options.prompt + options.new_tokens)
    tokens = torch.randint(VOCABULARY, (1, options.prompt))
    logits = decoder(tokens)
    start = time.perf_counter()
    for _ in range(options.new_tokens - 1):
        token = logits.argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, token), dim=1)
        logits = decoder(token)
    milliseconds = (time.perf_counter() - start) * 1e3 / (options.new_tokens - 1)
    print(f"after {options.prompt} tokens {milliseconds:.2f} ms a token")

    decoder.forget()
    in_one_pass = decoder(tokens)
    difference = (logits - in_one_pass).abs().max().item()
    print(f"largest difference from one pass over {tokens.shape[1]} tokens: {difference:.1e}")
    torch.testing.assert_close(logits, in_one_pass, rtol=1e-3, atol=1e-4)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    if options.prompt < CONFIG.dense_len:
        # Steps up to dense_len attend densely; the pass that they are compared with never does.
        parser.error(f"--prompt must be at least dense_len = {CONFIG.dense_len}")
    return options


if __name__ == "__main__":
    main()
