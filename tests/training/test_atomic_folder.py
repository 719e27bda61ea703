"""Published folders can be read by whom the umask lets read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infllm_flex.training.atomic_folder import publish, publish_from_all_ranks


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write(folder: Path) -> list[str]:
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    (folder / "notes.txt").write_text("a")
    return ["model.safetensors", "notes.txt"]


@pytest.mark.parametrize("how", [publish, publish_from_all_ranks])
def test_published_folders_have_the_permissions_of_the_umask(how, umask, tmp_path):
    folder = tmp_path / "outer" / "folder"
    how(folder, write)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name
