"""Loads that ought to be under way together, in the instructions for Hopper."""

import re
from collections.abc import Callable

import pytest

from benchmarking.ahead_of_time import compile_kernel, record_launches
from benchmarking.sass import disassemble
from tests.custom_ops.harness import INTERPRETED
from tests.custom_ops.test_dependent_launch import paged_step, step

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("needs the compiler: unset TRITON_INTERPRET", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


def instructions(monkeypatch: pytest.MonkeyPatch, call: Callable[[], None], kernel: str) -> str:
    """Return the machine code of a step's kernel."""
    launches = {x.kernel.__name__: x for x in record_launches(monkeypatch, call, 90)}
    return disassemble(compile_kernel(launches[kernel], 90).asm["cubin"])


@pytest.mark.parametrize("call", [step, paged_step])
def test_attention_to_one_block_loads_keys_and_values_before_it_stores_either(monkeypatch, call):
    text = instructions(monkeypatch, call, "split_kernel")
    before, after = text.split("BAR.SYNC", 1)
    loads = re.findall(r"\bLDG\.E\.128\b", before)
    assert len(loads) == (16 + 64 + 64) * 128 * 2 // (16 * 128)  # query, keys, values
    assert len(re.findall(r"\bSTS\.128\b", before)) == 16 * 128 * 2 // (16 * 128)  # the query
    assert "LDG" not in after


@pytest.mark.parametrize("call", [step, paged_step])
def test_scores_issue_all_their_first_loads_before_they_wait_for_the_kernel_before(
    monkeypatch, call
):
    before, _ = instructions(monkeypatch, call, "cached_score_kernel").split("ACQBULK")
    assert len(re.findall(r"\bLDG\.E\.128\b", before)) == (16 + 64) * 128 * 2 // (16 * 128)
    assert "STS" not in before


@pytest.mark.parametrize("call", [step, paged_step])
def test_the_log_sum_exp_of_one_step_loads_its_keys_with_the_query(monkeypatch, call):
    before, _ = instructions(monkeypatch, call, "cached_lse_kernel").split("BAR.SYNC", 1)
    assert len(re.findall(r"\bLDG\.E\.128\b", before)) == (16 + 64) * 128 * 2 // (16 * 128)
    assert "STS" not in before
