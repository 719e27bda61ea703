"""Settings of a benchmark: one frozen dataclass per section of its YAML file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import window_entries
from infllm_flex.strict_yaml import check_range
from infllm_flex.training.settings import check_llama_sizes

Mode = Literal["forward", "forward+backward"]
CaseMode = Literal["forward", "forward+backward", "decode"]
Inputs = Literal["text", "drifting", "independent"]

_LONGEST = 2**24


class Heads(NamedTuple):
    """Query heads and key/value heads."""

    query: int
    kv: int

    @classmethod
    def read(cls, text: str) -> Heads:
        """Read a pair such as ``8/2``.

        Raises:
            ValueError: It is none, or the second number does not divide the first.
        """
        match = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", text)
        if not match or int(match[1]) % int(match[2]):
            raise ValueError(
                f"heads must be pairs such as 8/2, the first a multiple of the second, got {text}"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.query}/{self.kv}"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where and how to measure.

    Attributes:
        out: The CSV. Rows are appended; existing rows are never replaced.
        device: Where to run.
        dtype: dtype of all tensors.
        threads: CPU threads; 0 keeps PyTorch's number.
        seed: Seed of the inputs.
        tests: Arguments of pytest; unless these tests pass, nothing is timed.
        warmup: Runs of each subject before timing, compilation included.
        rounds: Smallest number of rounds; a round runs everything that is compared once.
        max_rounds: Largest number of rounds.
        seconds: Time after which a comparison ends, once it has had ``rounds`` rounds.
    """

    out: Path
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 0
    seed: int = 0
    tests: tuple[str, ...] = ()
    warmup: int = 1
    rounds: int = 5
    max_rounds: int = 30
    seconds: float = 30.0

    def __post_init__(self) -> None:
        check_range("threads", self.threads, 0, 1024)
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_range("warmup", self.warmup, 1, 1000)
        check_range("rounds", self.rounds, 1, 100_000)
        check_range("max_rounds", self.max_rounds, self.rounds, 100_000)
        check_range("seconds", self.seconds, 0, 86_400)
        if self.out.suffix != ".csv":
            raise ValueError(f"out must name a .csv file, got {self.out}")


@dataclass(frozen=True, kw_only=True)
class ShapeSettings:
    """Shapes that all cases share.

    Attributes:
        heads: Pairs of query and key/value heads, such as ``8/2``; every case runs with each pair.
        head_dim: ``D``.
        batch: ``B``.
    """

    heads: tuple[str, ...]
    head_dim: int
    batch: int = 1

    def __post_init__(self) -> None:
        check_range("head_dim", self.head_dim, 8, 256)
        check_range("batch", self.batch, 1, 65_536)
        if not self.heads:
            raise ValueError("heads must list at least one pair such as 8/2, got none")
        for pair in self.heads:
            Heads.read(pair)

    @property
    def pairs(self) -> tuple[Heads, ...]:
        """``heads`` as numbers."""
        return tuple(Heads.read(pair) for pair in self.heads)


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


@dataclass(frozen=True, kw_only=True)
class FloorSettings:
    """Peak rates of the device, from which the column ``ms_floor`` is computed.

    Attributes:
        tflops: Matrix products, in 10^12 operations per second.
        terabytes: Memory, in 10^12 bytes per second.
        float8_tflops: Matrix products of float8 numbers; None: equal to ``tflops``.
    """

    tflops: float
    terabytes: float
    float8_tflops: float | None = None

    def __post_init__(self) -> None:
        for name in ("tflops", "terabytes", "float8_tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """All settings of ``scripts/benchmark.py``, read from one YAML file.

    Attributes:
        run: Where and how to measure.
        shapes: Shapes that all cases share.
        cases: Series of timings by name.
        attention: The sparse attention that is measured.
        variants: Other attention settings by name, measured beside ``attention`` in every case.
        engines: Engines to measure; each replaces the ``engine`` of all attention settings.
        memory: Lengths at which memory is measured.
        models: Whole models by name.
        floor: Peak rates of the device; None: the column ``ms_floor`` is empty.
    """

    run: RunSettings
    shapes: ShapeSettings
    cases: dict[str, CaseSettings]
    attention: InfLLMConfig = field(default_factory=InfLLMConfig)
    variants: dict[str, InfLLMConfig] = field(default_factory=dict)
    engines: tuple[Literal["auto", "flex", "fused"], ...] = ("auto",)
    memory: MemorySettings = field(default_factory=MemorySettings)
    models: dict[str, ModelSettings] = field(default_factory=dict)
    floor: FloorSettings | None = None

    def __post_init__(self) -> None:
        if not self.engines or len(set(self.engines)) < len(self.engines):
            raise ValueError(
                f"engines must name at least one engine, none twice, got {list(self.engines)}"
            )
        for name in self.variants:
            if not re.fullmatch(r"[a-z0-9_]+", name) or name == "default":
                raise ValueError(
                    f"variants must have names of small letters, digits and _; default is "
                    f"reserved for attention, got {name!r}"
                )
        self._check_lengths()
        self._check_pages()

    def _check_pages(self) -> None:
        sizes = {case.page_size for case in self.cases.values() if case.page_size}
        for name, config in self.attentions.items():
            for page_size in sizes:
                try:
                    window_entries(config, page_size)
                except (ValueError, NotImplementedError) as error:
                    section = f"variants.{name}" if name else "attention"
                    raise ValueError(
                        f"cases with page_size need other {section}: {error}"
                    ) from error

    def _check_lengths(self) -> None:
        shortest = min((n for case in self.cases.values() for n in case.lengths), default=None)
        for name, config in self.attentions.items():
            if shortest is not None and config.is_dense(shortest):
                section = f"variants.{name}" if name else "attention"
                raise ValueError(
                    f"cases must be sparse, got a length of {shortest}, below {section}.dense_len "
                    f"= {config.dense_len}: use longer ones, or dense_len: -1, which is always "
                    "sparse"
                )

    @property
    def timed_modes(self) -> set[CaseMode]:
        """The modes of cases with lengths, of memory and of models; if none, forward+backward."""
        modes: set[CaseMode] = {case.mode for case in self.cases.values() if case.lengths}
        modes |= {model.mode for model in self.models.values()}
        if self.memory.lengths or not modes:
            modes.add("forward+backward")
        return modes

    @property
    def attentions(self) -> dict[str, InfLLMConfig]:
        """All attention settings to measure by name; the name of ``attention`` is empty."""
        return {"": self.attention, **self.variants}

    def with_attention(self, name: str) -> BenchmarkSettings:
        """Return the same run with only one of ``attentions``."""
        return replace(self, attention=self.attentions[name], variants={})

    def with_batch_of(self, case: CaseSettings) -> BenchmarkSettings:
        """Return the same run with the batch of a case."""
        if case.batch is None:
            return self
        return replace(self, shapes=replace(self.shapes, batch=case.batch))
