"""The base of a comparison: what it needs, and where its weights are."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation.quality import base, scoring
from evaluation.quality.settings import BaseSettings
from tests.checkout import ROOT
from tests.evaluation.quality.tiny import make_base


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    message = rf"GGUF files are read with {missing}: pip install '\.\[smollm2\]'"
    with pytest.raises(base.BaseError, match=message):
        base._read_config(None, base.Source(Path(), "model.gguf"))
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    (extra,) = [line for line in lines if line.startswith("smollm2 = ")]
    assert f'"{missing}>=' in extra


@pytest.fixture
def saved_in_bfloat16(tmp_path):
    """A base in bfloat16, in several files, with fewer positions than are wanted."""
    folder = make_base(tmp_path / "given", max_position_embeddings=64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def _prepare(given: Path, folder: Path, as_it_is: bool) -> dict[str, list[int]]:
    settings = BaseSettings(folder=given, rope_theta=1e6)
    return base.prepare(settings, base.find(settings), 512, folder, as_it_is)


def test_a_base_as_it_is_has_its_own_weights_and_the_new_positions(saved_in_bfloat16, tmp_path):
    linked, written = tmp_path / "run" / "linked", tmp_path / "run" / "written"
    links = _prepare(saved_in_bfloat16, linked, as_it_is=True)
    assert _prepare(saved_in_bfloat16, written, as_it_is=False) == {}
    for name in links:
        assert (linked / name).samefile(saved_in_bfloat16 / name)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f) for f in (linked, written))
    assert (ours.dtype, theirs.dtype) == (torch.bfloat16, torch.float32)
    assert ours.config.max_position_embeddings == theirs.config.max_position_embeddings == 512
    assert ours.config.rope_parameters["rope_theta"] == 1e6
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own.float(), other)
    assert scoring._weights_dtype(linked, torch.device("cuda")) is torch.bfloat16
    assert scoring._weights_dtype(linked, torch.device("cpu")) is torch.float32
    assert scoring._weights_dtype(written, torch.device("cuda")) is torch.float32


def test_weights_that_were_linked_to_may_not_change(saved_in_bfloat16, tmp_path):
    folder = tmp_path / "run" / "base"
    links = _prepare(saved_in_bfloat16, folder, as_it_is=True)
    base.check_links(folder, links)
    assert _prepare(saved_in_bfloat16, folder, as_it_is=True) == links  # after an interruption
    changed = sorted(saved_in_bfloat16.glob("*.safetensors"))[1]
    changed.unlink()
    with pytest.raises(base.BaseError, match=f"{changed.name} is gone or has changed"):
        base.check_links(folder, links)


def test_quantized_and_other_weights_are_not_linked_to(saved_in_bfloat16, tmp_path):
    assert base._weight_files(base.Source(saved_in_bfloat16, "model.gguf")) == []
    other = tmp_path / "pickled"
    other.mkdir()
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "config.json"):
        (other / name).write_text("{}")
    assert base._weight_files(base.Source(other, None)) == []
    config = saved_in_bfloat16 / "config.json"
    described = json.loads(config.read_text()) | {"quantization_config": {"bits": 4}}
    config.write_text(json.dumps(described))
    assert base._weight_files(base.Source(saved_in_bfloat16, None)) == []
