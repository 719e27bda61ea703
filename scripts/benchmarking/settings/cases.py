"""The cases: series of timings over lengths, peaks of memory, and whole models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infllm_flex.strict_yaml import check_range
from infllm_flex.training.settings import check_llama_sizes

Mode = Literal["forward", "forward+backward"]
CaseMode = Literal["forward", "forward+backward", "decode"]
Inputs = Literal["text", "drifting", "independent"]

_LONGEST = 2**24


@dataclass(frozen=True, kw_only=True)
class CaseSettings:
    """A series of timings over lengths.

    Attributes:
        lengths: Tokens.
        mode: ``forward`` without gradients, ``forward+backward``, or ``decode``: one token after a
            cache of ``lengths`` tokens.
        inputs: ``text``: queries like those of a model trained on text; ``drifting``: neighbouring
            queries are similar, heads are independent; ``independent``: the worst case.
        batch: ``B`` of this case; None: that of ``shapes``.
        baselines: The baselines to compare with, such as ``sdpa_cudnn``; empty: all.
        tile_rows: Also time ``attend_blocks`` with tiles of these numbers of rows. A row is one
            head of one token. ``variant`` gives the blocks that a tile loads per selected block.
        page_size: Also time attention over a cache in pages of this many tokens, each token dense
            or sparse by its position, and dense attention over these pages; 0: do not.
        layers: Decode steps that are timed together, each over its own cache, as the layers of a
            model run them; the time of one is reported.
    """

    lengths: tuple[int, ...]
    mode: CaseMode = "forward"
    inputs: Inputs = "drifting"
    batch: int | None = None
    baselines: tuple[str, ...] = ()
    tile_rows: tuple[int, ...] = ()
    page_size: int = 0
    layers: int = 1

    def __post_init__(self) -> None:
        for length in self.lengths:
            check_range("lengths", length, 1, _LONGEST)
        check_range("layers", self.layers, 1, 1000)
        if self.layers > 1 and self.mode != "decode":
            raise ValueError(f"layers must be 1 where mode is {self.mode}, got {self.layers}")
        if self.batch is not None:
            check_range("batch", self.batch, 1, 65_536)
        for rows in self.tile_rows:
            check_range("tile_rows", rows, 1, 4096)
        check_range("page_size", self.page_size, 0, 65_536)
        if self.page_size and self.mode == "forward+backward":
            raise ValueError(
                "page_size must be 0 where mode is forward+backward: pages do not train"
            )

    @property
    def row_mode(self) -> str:
        """The mode in the CSV, which says of how many layers a step is one."""
        return self.mode if self.layers == 1 else f"{self.mode}_of_{self.layers}_layers"


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """Lengths at which the peak memory of forward and backward is measured.

    Attributes:
        lengths: Tokens.
    """

    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for length in self.lengths:
            check_range("lengths", length, 1, _LONGEST)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A Llama with random weights, patched and unpatched.

    Attributes:
        length: Tokens of its input.
        sparse: Whether the patched model is sparse at that length; if not, the length is one below
            dense_len.
        mode: ``forward`` without gradients, or ``forward+backward``.
        compile: Whether to run both models under torch.compile.
        num_layers: Transformer layers.
        hidden_size: Width, ``num_heads`` times the head dim.
        intermediate_size: Width of the feed-forward layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        rounds: Rounds; each runs both models once.
        limit: Upper limit of the patched over the unpatched time; None: no limit.
    """

    length: int
    sparse: bool = False
    mode: Mode = "forward"
    compile: bool = False
    num_layers: int = 2
    hidden_size: int = 256
    intermediate_size: int = 512
    num_heads: int = 4
    num_kv_heads: int = 2
    rounds: int = 100
    limit: float | None = None

    def __post_init__(self) -> None:
        check_range("length", self.length, 1, _LONGEST)
        check_range("rounds", self.rounds, 1, 100_000)
        check_llama_sizes(self)
