"""Load the weights of a model folder; folders that do not hold all of them are refused."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from infllm_flex.training.model_config import read_config
from infllm_flex.training.quiet import quiet_loggers, quiet_transformers

_NAMED = 3  # tensors that a message names
# The report of tensors that do not match, which errors here replace, and what it comes with.
_REPORTING = (
    "transformers.modeling_utils",
    "transformers.integrations.tensor_parallel",
    "transformers.distributed.tensor_parallel",
)


def load_weights(folder: Path, setting: str, **options: Any) -> Any:
    """Load a causal LM whose tensors are all in a local folder, without the folder's code.

    Args:
        folder: The model folder.
        setting: Name of the setting or option of the folder, for messages.
        options: For ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: The files cannot be read, lack tensors of the model or have tensors of another
            shape. transformers would start such tensors at random values.
    """
    from safetensors import SafetensorError

    with quiet_transformers() as transformers, quiet_loggers(*_REPORTING):
        try:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed in `found`, and refused below
                **options,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{setting}: the weights in {folder} cannot be read: {reason}"
            ) from error
    if problem := _problem(found):
        raise ValueError(
            f"{setting}: {folder} {problem}: give a complete folder, with the config.json and the "
            "names of tensors that transformers' save_pretrained writes"
        )
    if found["unexpected_keys"]:
        warnings.warn(
            f"{setting}: {folder} has tensors that the model does not use: "
            f"{_names(found['unexpected_keys'])}",
            stacklevel=1,  # one place for all callers, so that a run shows it once
        )
    return model


def check_weights(folder: Path, setting: str) -> None:
    """`load_weights` for its errors: reads the headers of the files, not the weights.

    Raises:
        ValueError: As `load_weights`.
    """
    # The tensors of the model are mapped from the files in their own dtype. On the meta device,
    # which needs accelerate, tensors that transformers merges take no memory either.
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    with quiet_transformers() as transformers:
        config = read_config(transformers, folder)
    load_weights(
        folder,
        setting,
        config=config,
        dtype="auto",
        use_safetensors=True,
        device_map="meta" if has_accelerate else None,
    )


def _problem(found: dict[str, Any]) -> str:
    problems = []
    if missing := found["missing_keys"]:
        problems.append(f"lacks {len(missing)} tensors of the model ({_names(missing)})")
        if unknown := found["unexpected_keys"]:
            problems.append(f"has {len(unknown)} unknown ones ({_names(unknown)})")
    shapes = {
        f"{name} {list(in_folder)} instead of {list(in_model)}"
        for name, in_folder, in_model in found["mismatched_keys"]
    }
    if shapes:
        problems.append(f"has tensors of other shapes than its config.json says ({_names(shapes)})")
    return " and ".join(problems)


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names)[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
