import logging
import time

import torch

from infllm_flex.engines.compile_notice import CompileNotice

PATIENCE = 0.05


def test_slow_first_calls_are_explained_once(caplog):
    notice = CompileNotice(PATIENCE)
    with caplog.at_level(logging.WARNING, logger="infllm_flex"):
        for length in (16, 16, 32):
            with notice.watch((torch.Size((1, length)),)):
                time.sleep(10 * PATIENCE)
    assert [record.getMessage() for record in caplog.records] == [
        "compiling FlexAttention for a new length: some seconds, once for each power of two"
    ]


def test_a_quick_call_says_nothing(caplog):
    notice = CompileNotice(PATIENCE)
    with caplog.at_level(logging.WARNING, logger="infllm_flex"):
        with notice.watch((16,)):
            pass
        time.sleep(4 * PATIENCE)
    assert not caplog.records


def test_a_shape_that_was_compiled_for_is_not_timed_again(caplog):
    notice = CompileNotice(PATIENCE)
    with notice.watch((16,)):
        pass
    with caplog.at_level(logging.WARNING, logger="infllm_flex"), notice.watch((16,)):
        time.sleep(4 * PATIENCE)
    assert not caplog.records
