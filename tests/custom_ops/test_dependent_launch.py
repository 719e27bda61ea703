"""Kernels that start while the one before ends read and write nothing of it before they wait."""

import re

import pytest
import torch

from benchmarking.ahead_of_time import Launch, compile_kernel, record_launches
from infllm_flex_ops.selection.rule import SelectionRule
from tests.custom_ops.compiled import BRAIN, FLOAT, meta
from tests.custom_ops.harness import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("needs the compiler: unset TRITON_INTERPRET", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")

# Kernels that follow another one of their operator may read what is older than that one.
FOLLOW = {"cached_score_kernel", "cached_topk_kernel", "join_kernel"}
RULE = SelectionRule(32, 16, 128, 64, 64, 1, 32, 96)
SIZES = (*RULE.windows, *RULE.coarse_windows)


def step(dtype: torch.dtype = BRAIN, S: int = 32768) -> None:
    """Launch all kernels of a step over a cache in one piece, scored in both ways."""
    from infllm_flex_ops.block_attention.kernels import attend_cached_blocks
    from infllm_flex_ops.selection.kernels import append_windows
    from infllm_flex_ops.selection.kernels.decode import launch, launch_pooled

    q, (k, v) = meta(1, 32, 1, 128, dtype=dtype), meta(2, 1, 2, S, 128, dtype=dtype)
    windows = [meta(1, 2, S // stride, 128, dtype=dtype) for stride in (16, 64)]
    ends = [meta(1, dtype=torch.int64) for _ in range(2)]
    append_windows.launch(k, *windows, *ends, None, None, 1, *SIZES)
    launch.launch(q, *windows, *ends, RULE, 8192, 128, 1.0)
    pooled = SelectionRule.from_pooled(1, 64, 1, 4, 96)
    launch_pooled.launch(q, k, *ends, pooled, 8192, 128, False)
    selected = meta(1, 2, 1, 128, dtype=torch.int32)
    attend_cached_blocks.launch(q, k, v, selected, *ends, 64, 1.0)


def paged_step() -> None:
    """Launch all kernels of a step over pages, scored in both ways."""
    from infllm_flex_ops.block_attention.kernels import attend_cached_blocks
    from infllm_flex_ops.selection.kernels import append_windows
    from infllm_flex_ops.selection.kernels.decode import launch, launch_pooled

    q, (k, v) = meta(1, 32, 128, dtype=BRAIN), meta(2, 512, 2, 64, 128, dtype=BRAIN)
    windows = [meta(512, 2, entries, 128, dtype=BRAIN) for entries in (4, 1)]
    where = meta(1, 512, dtype=torch.int32), *meta(2, 2, dtype=torch.int32)
    append_windows.launch_paged(k, *windows, *where, 1, *SIZES)
    launch.launch_paged(q, *windows, *where, RULE, 8192, 128, 1, 1.0)
    pooled = SelectionRule.from_pooled(1, 64, 1, 4, 96)
    launch_pooled.launch_paged(q, k, *where, pooled, 8192, 128, 1, False)
    attend_cached_blocks.launch_paged(q, k, v, meta(2, 1, 128, dtype=torch.int32), *where, 64, 1, 1)


def before_wait(launch: Launch) -> str:
    """Return the instructions before the wait."""
    ptx = compile_kernel(launch, 90).asm["ptx"]
    before, *after = ptx.split("griddepcontrol.wait")
    assert len(after) == 1
    assert "griddepcontrol.launch_dependents" in after[0]
    return before


@pytest.mark.parametrize(("call", "count"), [(step, 7), (paged_step, 7), (lambda: step(FLOAT), 6)])
def test_nothing_but_older_memory_is_touched_before_the_wait(monkeypatch, call, count):
    launches = record_launches(monkeypatch, call, 90)
    overlapping = [launch for launch in launches if launch.options.get("launch_pdl")]
    assert len(overlapping) == count
    for launch in overlapping:
        before, name = before_wait(launch), launch.kernel.__name__
        assert not re.search(r"\b(st\.global|atom|red)\b|\b(ret|bra)\b", before), name
        assert name in FOLLOW or not re.search(r"\bld\.global|cp\.async", before), name


def test_scores_load_their_first_keys_before_the_wait(monkeypatch):
    launches = {x.kernel.__name__: x for x in record_launches(monkeypatch, step, 90)}
    assert before_wait(launches["cached_score_kernel"]).count("ld.global") > 2


@pytest.mark.parametrize("capability", [80, 89])
def test_older_devices_start_a_kernel_when_the_one_before_has_ended(monkeypatch, capability):
    for launch in record_launches(monkeypatch, step, capability):
        assert "launch_pdl" not in launch.options
        assert "griddepcontrol" not in compile_kernel(launch, capability).asm["ptx"]


def test_a_list_of_every_block_waits_for_the_lengths(monkeypatch):
    # Without scores to wait for, the kernel that lists blocks follows the one that moves the end.
    launches = record_launches(monkeypatch, lambda: step(S=2048), 90)
    overlaps = {x.kernel.__name__: x.options.get("launch_pdl", False) for x in launches}
    assert "cached_lse_kernel" not in overlaps
    assert not overlaps["cached_topk_kernel"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_in_a_graph_repeat_their_bits_while_the_cache_changes():
    """Each replay follows a change of the lengths at once: a kernel that did not wait would see."""
    from infllm_flex.config import InfLLMConfig
    from infllm_flex.decoding import CompressedKeys, decode_attention

    config = InfLLMConfig(dense_len=-1)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, n, 128, device="cuda", dtype=BRAIN, generator=generator)
        for heads, n in ((32, 1), (2, 32769), (2, 32769))
    )
    keys = CompressedKeys(config, k)
    keys.append(k, k.shape[2])
    ends = [keys.end.clone() - 1000 * i for i in range(4)]
    expected = []
    for end in ends:
        keys.append(k, 1, end=end)
        torch.cuda.synchronize()
        expected.append(decode_attention(q, k, v, keys))
        torch.cuda.synchronize()
    end = ends[0].clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        keys.append(k, 1, end=end)
        decode_attention(q, k, v, keys)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keys.append(k, 1, end=end)
        out = decode_attention(q, k, v, keys)
    for turn in range(200):
        end.copy_(ends[turn % 4])
        graph.replay()
        assert torch.equal(out, expected[turn % 4])
