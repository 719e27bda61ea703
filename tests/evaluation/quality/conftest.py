"""A base, texts, and the config of a small comparison."""

from __future__ import annotations

import pytest

from tests.evaluation.quality.tiny import make_base, make_texts, settings_of, write_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def config(tmp_path, base, texts):
    """A comparison of one seed and two retrieval tasks."""
    settings = settings_of(tmp_path / "run", base, texts)
    settings["run"]["seeds"] = [0]
    settings["judge"] |= {"tasks": ["keys12", "steps"], "groups": ["retrieval", "nats"]}
    settings["variants"]["fine"]["back_to_dense"] = False
    return write_settings(tmp_path / "quality.yaml", settings)
