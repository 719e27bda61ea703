"""Settings of ``scripts/benchmark_models.py``: a frozen dataclass per section of its file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infllm_flex.config import InfLLMConfig
from infllm_flex.strict_yaml import check_range
from infllm_flex.training.settings import check_llama_sizes

Phase = Literal["overlap", "prefill", "decode", "decode_static", "train"]
Activations = Literal["text", "random", "trained"]

_LONGEST = 2**24


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where, how and how long to measure.

    Attributes:
        out: The CSV. Rows are appended; measurements that it already holds are skipped.
        device: Where to run.
        dtype: dtype of weights and activations.
        threads: CPU threads; 0 keeps PyTorch's number.
        seed: Seed of weights and inputs.
        warmup: Runs of each model before timing.
        rounds: Rounds; each runs the dense and the patched model once.
        steps: Tokens that one round of decoding generates.
        max_seconds: Time after which nothing more begins; 0: no limit.
        compile_backend: Backend of torch.compile for static decoding. Only Inductor makes CUDA
            graphs.
    """

    out: Path
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    threads: int = 0
    seed: int = 0
    warmup: int = 1
    rounds: int = 3
    steps: int = 16
    max_seconds: float = 0.0
    compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"

    def __post_init__(self) -> None:
        check_range("threads", self.threads, 0, 1024)
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_range("warmup", self.warmup, 1, 1000)
        check_range("rounds", self.rounds, 1, 100_000)
        check_range("steps", self.steps, 1, 10_000)
        check_range("max_seconds", self.max_seconds, 0, 86_400)
        if self.out.suffix != ".csv":
            raise ValueError(f"out must name a .csv file, got {self.out}")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A causal LM of transformers, by the numbers of its ``config.json``.

    Attributes:
        family: Its type in transformers.
        num_layers: Layers of the whole model.
        hidden_size: Width.
        intermediate_size: Width of the feed-forward layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        vocab_size: Tokens of the vocabulary.
        rope_theta: Base of the rotary embedding.
        package: A Python package with one ``.gguf`` file, whose trained weights the case
            ``overlap`` measures beside the random ones; None: there is none.
        attention: Attention settings; None: what ``patch_model`` takes for such a model.
    """

    family: Literal["llama", "qwen3", "minicpm"]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float = 10_000.0
    package: str | None = None
    attention: InfLLMConfig | None = None

    def __post_init__(self) -> None:
        check_llama_sizes(self)
        check_range("vocab_size", self.vocab_size, 2, 2**24)
        check_range("rope_theta", self.rope_theta, 2, 1e12)

    @property
    def head_dim(self) -> int:
        """``D``."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A series of measurements of one phase.

    Attributes:
        phase: ``prefill``: from the prompt to the first token. ``decode``: a step over
            transformers' growing cache, eager. ``decode_static``: a step over a static cache,
            compiled. ``train``: forward and backward, every layer recomputed, without an optimizer.
            ``overlap``: how many blocks tiles load, per selected block; nothing is timed.
        lengths: Tokens of the sequence, or in the cache before a step.
        models: Names of the models; empty: all.
        activations: ``text``: queries and keys of neighbouring tokens are as related as in a model
            trained on text. ``random``: unrelated, the worst case. ``trained``: those of the
            model's ``package`` on a text, in ``overlap`` only.
        layers: Layers that are built; 0: all of the model.
        batch: ``B``.
        dense: Backend of the dense model: ``cudnn``, or the ``default`` of PyTorch.
        profile: Whether to sum up the device's time by groups of kernels in one more run.
    """

    phase: Phase
    lengths: tuple[int, ...]
    models: tuple[str, ...] = ()
    activations: tuple[Activations, ...] = ("random",)
    layers: int = 0
    batch: int = 1
    dense: Literal["default", "cudnn"] = "default"
    profile: bool = False

    def __post_init__(self) -> None:
        for length in self.lengths:
            check_range("lengths", length, 16, _LONGEST)
        if not self.activations or len(set(self.activations)) < len(self.activations):
            raise ValueError(
                f"activations must name at least one kind, none twice, got {list(self.activations)}"
            )
        check_range("layers", self.layers, 0, 1024)
        check_range("batch", self.batch, 1, 65_536)


@dataclass(frozen=True, kw_only=True)
class ModelBenchmark:
    """All settings of ``scripts/benchmark_models.py``, read from one YAML file.

    Attributes:
        run: Where, how and how long to measure.
        models: Shapes by name.
        cases: Series of measurements by name, in the order in which they run.
    """

    run: RunSettings
    models: dict[str, ModelShape]
    cases: dict[str, ModelCase]

    def __post_init__(self) -> None:
        if not self.models or not self.cases:
            raise ValueError("models and cases must name at least one each")
        for name in (*self.models, *self.cases):
            if not re.fullmatch(r"[a-z0-9_.]+", name):
                raise ValueError(
                    f"models and cases must have names of small letters, digits, _ and ., got "
                    f"{name!r}"
                )
        for name, case in self.cases.items():
            self._check_case(name, case)

    def _check_case(self, name: str, case: ModelCase) -> None:
        unknown = set(case.models) - set(self.models)
        if unknown:
            raise ValueError(
                f"cases.{name}.models must be names of models, {', '.join(self.models)}; got "
                f"{', '.join(sorted(unknown))}"
            )
        for model in case.models or self.models:
            shape = self.models[model]
            if case.layers > shape.num_layers:
                raise ValueError(
                    f"cases.{name}.layers must be at most the {shape.num_layers} layers of "
                    f"{model}, got {case.layers}"
                )
            if "trained" in case.activations and (case.phase != "overlap" or not shape.package):
                raise ValueError(
                    f"cases.{name}.activations: trained is for phase: overlap, and for models with "
                    f"a package; got {case.phase} of {model}"
                )
