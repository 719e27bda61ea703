"""The settings of an InfLLM-V2 attention layer."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LSE_CHOICES = ("coarse", "exact")
_ENGINE_CHOICES = ("auto", "flex", "fused")
_SCORE_DTYPE_CHOICES = ("same", "float8")
_DENSE_BY_CHOICES = ("sequence", "position")
_LARGEST = 2**31 - 1  # block and token indices are int32


@dataclass(frozen=True, kw_only=True)
class InfLLMConfig:
    """Settings of InfLLM-V2 attention, named and defaulted as in the released ``sparse_config``.

    Lengths and sizes are in tokens; ``*_blocks`` and ``topk`` are in blocks of ``block_size`` keys.

    A sparse query sees at most ``window_size + topk * block_size`` tokens, 6144 by default. These
    visible tokens are ``num_selected = topk + window_size / block_size`` blocks, the budget. The
    first blocks of the sequence, those of the window and the query's own count toward it.

    Settings constrain each other. ``kernel_size`` and ``block_size`` are multiples of
    ``kernel_stride``, and ``window_size`` is one of ``block_size``. ``topk`` is at least
    ``init_blocks + 1``. With ``pool_queries``, ``kernel_size`` equals ``kernel_stride`` and ``lse``
    is ``"coarse"``. Without it, ``score_dtype`` is ``"same"`` and ``score_dims`` is 0.

    ``describe(model)`` shows the settings of a patched model, in a row for each attention layer:
    ``name`` of the module, ``patched_through`` (the adapter), ``sparse`` (True or False),
    ``status`` (the same in words, with a reason), ``config`` (these settings; None unless the layer
    is sparse), and ``origin`` (where the settings come from).

    Attributes:
        kernel_size: Pooling window of the compressed keys.
        kernel_stride: Step between pooling windows. The coarse keys use four times both.
        init_blocks: First blocks of the sequence, always selected.
        block_size: Keys per block, the unit of selection.
        window_size: Tokens before the query's own block that are always visible, in whole blocks.
        topk: Blocks of the budget beyond the window's; the whole budget is ``num_selected``.
        dense_len: A sequence is dense iff its length is below this. -1: always sparse.
        dense_by: ``"sequence"``: the queries of a sequence are all dense or all sparse, by its
            whole length. ``"position"``: each query is dense iff the tokens up to it, its own
            included, are fewer than ``dense_len``. Its output then depends on these tokens alone,
            as a server needs that works in chunks or keeps prefixes. Steps of generation over a
            cache go by position with either.
        use_nope: Score with the queries and keys from before the rotary embedding.
        lse: Normalise scores by the log-sum-exp of the ``"coarse"`` keys, or by the compressed
            keys' own, ``"exact"``.
        engine: Attention over the selected blocks by ``"flex"`` (compiled FlexAttention),
            ``"fused"`` (the ``attend_blocks`` operator), or ``"auto"``. Not part of a checkpoint.
        pool_queries: Score blocks with the mean of the group's queries instead of with each
            query: the score of a block is the largest dot product of that mean with a compressed
            key. One product per group instead of one per head pays for windows as short as one key.
            Windows must not overlap; ``lse`` is not used, since one query needs no normaliser.
        score_dtype: The dtype in which pooled queries and compressed keys are multiplied:
            ``"same"`` as the keys, or ``"float8"`` (e4m3).
        score_dims: Head dims in which they are multiplied: those of the lowest rotary frequencies,
            which are ``i`` and ``i + D / 2`` for the last ``score_dims / 2`` of ``i < D / 2``. A
            multiple of 4, best a power of two from 32 on; 0: all. A cache keeps a copy of these
            dims, in ``score_dtype`` where the device knows it, and generation scores by it. For
            rotary embeddings that rotate ``i`` with ``i + D / 2`` over the whole head, as those of
            Llama, Qwen, Mistral, Gemma and MiniCPM do.

    Raises:
        ValueError: A value has the wrong type or is impossible; the message names key and value.

    Source: arXiv 2509.24663, sections 3 and 4, and the ``sparse_config`` of openbmb/MiniCPM4.1-8B.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    dense_len: int = 8192
    dense_by: str = "sequence"
    use_nope: bool = False
    lse: str = "coarse"
    engine: str = "auto"
    pool_queries: bool = False
    score_dtype: str = "same"
    score_dims: int = 0

    def __post_init__(self) -> None:
        self._check_integer("kernel_stride", minimum=1)
        self._check_integer("kernel_size", minimum=1)
        self._check_integer("block_size", minimum=1)
        self._check_integer("init_blocks", minimum=0)
        self._check_integer("window_size", minimum=0)
        self._check_integer("topk", minimum=1)
        self._check_integer("dense_len", minimum=-1)
        self._check_integer("score_dims", minimum=0)
        for key in ("use_nope", "pool_queries"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} must be true or false, got {getattr(self, key)!r}")
        self._check_choice("dense_by", _DENSE_BY_CHOICES)
        self._check_choice("lse", _LSE_CHOICES)
        self._check_choice("engine", _ENGINE_CHOICES)
        self._check_choice("score_dtype", _SCORE_DTYPE_CHOICES)
        self._check_multiple("kernel_size", "kernel_stride")
        self._check_multiple("block_size", "kernel_stride")
        self._check_multiple("window_size", "block_size")
        if self.topk <= self.init_blocks:
            raise ValueError(
                f"topk must be at least init_blocks + 1 = {self.init_blocks + 1}, "
                f"so that the forced blocks fit the budget, got {self.topk}"
            )
        if self.num_selected > _LARGEST:
            raise ValueError(
                f"topk + window_size / block_size must be at most {_LARGEST} blocks, "
                f"got {self.num_selected}"
            )
        self._check_pooling()

    def _check_pooling(self) -> None:
        if self.pool_queries and self.kernel_size != self.kernel_stride:
            raise ValueError(
                f"pool_queries needs windows that do not overlap: kernel_size must be "
                f"kernel_stride = {self.kernel_stride}, got {self.kernel_size}"
            )
        if self.pool_queries and self.lse != "coarse":
            raise ValueError(
                f"lse must be coarse where pool_queries is true, which needs no normaliser, "
                f"got {self.lse!r}"
            )
        if self.score_dtype != "same" and not self.pool_queries:
            raise ValueError(
                f"score_dtype must be same where pool_queries is false, got {self.score_dtype!r}"
            )
        if self.score_dims % 4:
            raise ValueError(f"score_dims must be a multiple of 4, got {self.score_dims}")
        if self.score_dims and not self.pool_queries:
            raise ValueError(
                f"score_dims must be 0 (all) where pool_queries is false, got {self.score_dims}"
            )
        if self.score_dims and self.use_nope:
            raise ValueError(
                f"score_dims must be 0 (all) where use_nope is true: queries and keys from before "
                f"the rotary embedding have no frequencies, got {self.score_dims}"
            )

    def _check_integer(self, key: str, minimum: int) -> None:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key} must be an integer, got {value!r} ({type(value).__name__})")
        if not minimum <= value <= _LARGEST:
            raise ValueError(f"{key} must be between {minimum} and {_LARGEST}, got {value}")

    def _check_choice(self, key: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, key)
        if value not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")

    def _check_multiple(self, key: str, of: str) -> None:
        value, divisor = getattr(self, key), getattr(self, of)
        if value % divisor:
            raise ValueError(f"{key} must be a multiple of {of} = {divisor}, got {value}")

    @property
    def local_blocks(self) -> int:
        """Blocks before the query's own block that are always selected."""
        return self.window_size // self.block_size

    @property
    def num_selected(self) -> int:
        """Selected blocks per query; init, local and own blocks count toward it."""
        return self.topk + self.local_blocks

    @property
    def coarse_size(self) -> int:
        """Pooling window of the coarse keys, in tokens."""
        return 4 * self.kernel_size

    @property
    def coarse_stride(self) -> int:
        """Step between the windows of the coarse keys, in tokens."""
        return 4 * self.kernel_stride

    @property
    def budget_tokens(self) -> int:
        """Tokens in the blocks that a query selects."""
        return self.num_selected * self.block_size

    @property
    def uses_coarse_keys(self) -> bool:
        """Whether coarse keys normalise the scores."""
        return self.lse == "coarse" and not self.pool_queries

    @property
    def scores_keys(self) -> bool:
        """Whether the keys themselves are scored, so that no compressed keys are kept."""
        return self.pool_queries and self.kernel_size == 1 and not self.score_dims

    def num_score_dims(self, head_dim: int) -> int:
        """Head dims in which queries and keys are multiplied to score blocks.

        Args:
            head_dim: Head dim ``D`` of queries and keys.

        Raises:
            ValueError: ``score_dims`` is not less than the head dim, or the head dim is odd.
        """
        if self.score_dims and (self.score_dims >= head_dim or head_dim % 2):
            raise ValueError(
                f"score_dims must be less than the head dim, an even number, got "
                f"{self.score_dims} for heads of {head_dim} (0 scores by all)"
            )
        return self.score_dims or head_dim

    @property
    def longest_dense(self) -> int:
        """Tokens of the longest sequence that is dense."""
        return max(self.dense_len - 1, 0)

    def is_dense(self, length: int) -> bool:
        """Whether every query of a sequence of ``length`` tokens is dense; equality is sparse."""
        return length < self.dense_len

    def count_dense(self, length: int) -> int:
        """Queries of a sequence of ``length`` tokens that are dense: its first ones, if any."""
        if self.is_dense(length):
            return length
        return self.longest_dense if self.dense_by == "position" else 0

    def max_visible(self, length: int) -> int:
        """Tokens that a query of a sequence of ``length`` tokens attends to at most."""
        return max(self.count_dense(length), min(length, self.budget_tokens))

    def to_sparse_config(self) -> dict[str, Any]:
        """Return the ``sparse_config`` that a checkpoint carries.

        ``engine`` is left out: it belongs to the machine that runs the model, not to the model.
        `from_model_config` reads the result to equal settings, with the default engine.
        """
        settings = dataclasses.asdict(self)
        del settings["engine"]
        return settings

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> InfLLMConfig:
        """Build a config from settings by name; settings that are missing keep their default.

        Args:
            mapping: Setting names to values.

        Raises:
            ValueError: Not a mapping, an unknown key (with the nearest known one), or a bad value.
        """
        if not isinstance(mapping, Mapping):
            raise ValueError(
                f"attention settings must be a mapping of names to values, "
                f"got {type(mapping).__name__}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in mapping:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"unknown attention setting {key!r}: {mapping[key]!r} ({hint})")
        return cls(**mapping)

    @classmethod
    def from_model_config(cls, hf_config: object) -> InfLLMConfig:
        """Read the ``sparse_config`` of a checkpoint's model config; defaults where it has none.

        Args:
            hf_config: A transformers ``PretrainedConfig``, or any object or mapping of that shape.

        Raises:
            ValueError: ``sparse_config`` is there but not a valid mapping of settings.
        """
        if isinstance(hf_config, Mapping):
            sparse_config = hf_config.get("sparse_config")
        else:
            sparse_config = getattr(hf_config, "sparse_config", None)
        return cls() if sparse_config is None else cls.from_dict(sparse_config)

    @classmethod
    def from_yaml(cls, path: str | Path) -> InfLLMConfig:
        """Read the ``attention:`` section of a config file, or a file of that section alone.

        Args:
            path: A YAML file.

        Raises:
            ValueError: The file is missing, empty, a directory, not YAML, not a mapping, or holds
                an unknown key or bad value. The message names file, line, key and nearest key.
        """
        from infllm_flex.strict_yaml import build_dataclass, load_yaml

        document = load_yaml(path)
        section = document.section("attention") if "attention" in document else document
        return build_dataclass(cls, section)
