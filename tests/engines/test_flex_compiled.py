import logging
import time

import pytest
import torch

from infllm_flex.engines import flex_compiled


@pytest.fixture
def slow_compiler(monkeypatch):
    """A compiler whose first call of each shape takes longer than the patience set here."""
    monkeypatch.setattr(flex_compiled, "_SLOW_SECONDS", 0.05)
    monkeypatch.setattr(flex_compiled, "_met", set())
    monkeypatch.setattr(flex_compiled, "_compiled", lambda function, dynamic: function)
    flex_compiled._say_compiling.cache_clear()
    yield
    flex_compiled._say_compiling.cache_clear()


def wait(q):
    time.sleep(0.5)
    return q


def test_a_slow_first_call_is_explained_once(slow_compiler, caplog):
    with caplog.at_level(logging.WARNING, logger="infllm_flex"):
        for length in (16, 16, 32):
            flex_compiled.run_compiled(wait, False, torch.zeros(1, 2, length, 4))
    assert [record.getMessage() for record in caplog.records] == [
        "compiling FlexAttention for a new length: some seconds, once for each power of two"
    ]


def test_a_quick_call_says_nothing(slow_compiler, caplog):
    with caplog.at_level(logging.WARNING, logger="infllm_flex"):
        flex_compiled.run_compiled(lambda q: q, False, torch.zeros(1, 2, 16, 4))
    time.sleep(0.2)
    assert not caplog.records
