"""A base in a GGUF file needs packages; their absence is said before any work."""

import importlib.util
from pathlib import Path

import pytest

from evaluation.quality import base
from tests.checkout import ROOT


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    message = rf"GGUF files are read with {missing}: pip install '\.\[smollm2\]'"
    with pytest.raises(base.BaseError, match=message):
        base._read_config(None, base.Source(Path(), "model.gguf"))
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    (extra,) = [line for line in lines if line.startswith("smollm2 = ")]
    assert f'"{missing}>=' in extra
