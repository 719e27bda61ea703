"""The configuration of MiniCPM, under the names of its own ``config.json``."""

from __future__ import annotations

import math
from typing import Any, ClassVar

# The base class alone: this module is imported in the middle of transformers' own imports.
from transformers.configuration_utils import PreTrainedConfig

from infllm_flex.minicpm.checks import check_longrope, check_settings, read_rope
from infllm_flex.minicpm.first_config import announce_config

# The defaults of MiniCPM's own configuration, for settings that config.json does not have.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": None,
    "intermediate_size": 11008,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "scale_emb": None,
    "scale_depth": None,
    "dim_model_base": None,
    "sparse_config": None,
}


class MiniCPMConfig(PreTrainedConfig):
    """Settings of MiniCPM 1, 2, 4 and 4.1, read and saved under the names of their ``config.json``.

    ``AutoConfig`` finds the class by ``model_type``. Early folders have no ``model_type`` and need
    the class by name: ``from_pretrained(folder, config=MiniCPMConfig.from_pretrained(folder))``.

    With longrope, sequences of up to ``original_max_position_embeddings`` tokens use the short
    factors, longer sequences the long factors.

    Args:
        settings: Settings by name. ``scale_emb``, ``scale_depth``, ``dim_model_base`` and the sizes
            have no default; ``rope_scaling`` has its type under ``rope_type`` or ``type``.

    Raises:
        ValueError: The model is not supported, or a setting is missing or impossible.
    """

    model_type = "minicpm"
    has_no_defaults_at_init = True  # otherwise older versions make one without settings
    base_model_tp_plan: ClassVar = {  # how transformers splits the layers of a model over devices
        **{f"layers.*.self_attn.{name}_proj": "colwise" for name in ("q", "k", "v")},
        **{f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")},
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    mlp_bias = False  # read by Granite's code

    def __new__(cls, *args: Any, **kwargs: Any) -> MiniCPMConfig:
        """Register the model, which cannot be built without a configuration."""
        announce_config()  # copies and unpickled configurations are made by this method, too
        return super().__new__(cls)

    def __init__(self, **settings: Any) -> None:
        settings = {**_DEFAULTS, **settings}
        check_settings(settings)
        if settings["num_key_value_heads"] is None:
            settings["num_key_value_heads"] = settings["num_attention_heads"]
        for name in _DEFAULTS:  # before the base class, which reads some of them
            setattr(self, name, settings[name])
        scaling = settings.pop("rope_scaling", None) or settings.pop("rope_parameters", None)
        self.rope_parameters = self._read_rope(scaling, settings.pop("rope_theta", 10_000.0))
        super().__init__(**settings)

    def _read_rope(self, scaling: dict[str, Any] | None, theta: float) -> dict[str, Any]:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = read_rope(scaling, theta, {"default", *ROPE_INIT_FUNCTIONS})
        if rope["rope_type"] == "longrope":
            head_dim = self.hidden_size // self.num_attention_heads
            check_longrope(rope, head_dim, self.max_position_embeddings)
        return rope

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, theta: float) -> None:
        self.rope_parameters["rope_theta"] = theta

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """Scaling of the rotary embedding, as in ``config.json``; None without scaling."""
        rope = {name: v for name, v in self.rope_parameters.items() if name != "rope_theta"}
        return None if rope == {"rope_type": "default"} else rope

    @rope_scaling.setter
    def rope_scaling(self, scaling: dict[str, Any] | None) -> None:
        self.rope_parameters = self._read_rope(scaling, self.rope_theta)

    def _validate_longrope_rope_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Check nothing: transformers would warn of a missing factor, which is no fault here."""

    # The names under which Granite's code reads the scales.

    @property
    def embedding_multiplier(self) -> float:
        """Factor on embeddings."""
        return self.scale_emb

    @property
    def residual_multiplier(self) -> float:
        """Factor on the residual that each half of a layer adds."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logits_scaling(self) -> float:
        """Divisor of logits."""
        return self.hidden_size / self.dim_model_base

    @property
    def attention_multiplier(self) -> float:
        """Factor on the products of queries and keys."""
        return (self.hidden_size // self.num_attention_heads) ** -0.5

    def to_dict(self) -> dict[str, Any]:
        """All settings under MiniCPM's own names."""
        settings = super().to_dict()
        settings.pop("rope_parameters", None)
        return {**settings, "rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the content of ``config.json``: every setting of MiniCPM, and others set."""
        settings = super().to_diff_dict()
        settings |= {name: getattr(self, name) for name in _DEFAULTS}
        if "dtype" in settings:  # MiniCPM's own code runs with versions that read `torch_dtype`
            settings["torch_dtype"] = settings.pop("dtype")
        return settings
