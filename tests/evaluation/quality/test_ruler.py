"""RULER's prompts: as many as are asked, and no more."""

from __future__ import annotations

import pytest

from evaluation.quality.ruler import _loops_of, _no_sentences, _prompts
from tests.evaluation.quality.tiny import make_tokenizer


def test_loops_with_a_progress_bar_end_early_inside_only():
    import tqdm

    whole = tqdm.tqdm
    with _loops_of(3):
        from tqdm import tqdm as shown

        assert list(shown(range(500), desc="prompts")) == [0, 1, 2]
        assert list(shown([7])) == [7]
    assert tqdm.tqdm is whole


def test_a_task_makes_as_many_prompts_as_are_asked(tmp_path):
    pytest.importorskip("lm_eval")
    make_tokenizer().save_pretrained(tmp_path)
    with _no_sentences():
        found = _prompts(("niah_multikey_2",), 6000, str(tmp_path), 0, 3)
    (task,) = found["tasks"].values()
    assert len(list(task.test_docs())) == 3
