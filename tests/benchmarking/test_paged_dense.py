"""Dense attention over pages: what it computes, what packages are given, and how it is reported.

No package runs without a GPU. Stand-ins with their documented signatures read the pages.
"""

from __future__ import annotations

import functools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from benchmarking.inputs import QKV
from benchmarking.paged import PagedAttention
from benchmarking.paged_dense import paged_dense_subjects
from benchmarking.report import speed_table, speed_ups
from benchmarking.results import COLUMNS
from benchmarking.work import work_of
from infllm_flex import reference
from tests.benchmarking.command import rows_of
from tests.inputs import make_qkv, small_config

S, B, HQ, HKV, D, PAGE = 200, 3, 8, 2, 16, 32
PACKAGES = {
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_3_paged": "flash_attn_interface",
    "flashinfer_paged": "flashinfer",
}


def inputs(n):
    return QKV(*make_qkv(S, B=B, Hq=HQ, Hkv=HKV, D=D, Sq=n))


def over_pages(n, *, has_packages=True, **options):
    qkv = inputs(n)
    pages = PagedAttention(qkv, small_config(), PAGE).pages
    return paged_dense_subjects([qkv], [pages], has_packages=has_packages, **options)


def dense(qkv):
    """Attend causally from the last queries: ``[B * n, Hq, D]``."""
    n, S = qkv.query.shape[2], qkv.key.shape[2]
    mask = torch.arange(S) <= torch.arange(S - n, S)[:, None]
    mask = mask.expand(len(qkv.key), qkv.key.shape[1], -1, -1)
    out = reference.masked_attention(*qkv, mask, scale=qkv.key.shape[-1] ** -0.5)
    return out.transpose(1, 2).flatten(0, 1).to(qkv.query.dtype)


def one_piece(pages, table, length):
    """Bring pages ``[P, page_size, Hkv, D]`` of some rows to ``[B, Hkv, length, D]``."""
    return pages[table.long()].flatten(1, 2)[:, :length].transpose(1, 2)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
    cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
    q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
):  # fmt: skip
    assert causal
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    if page_table is None:
        key, value = (x.transpose(1, 2) for x in (k_cache, v_cache))
    else:
        assert page_table.dtype == cache_seqlens.dtype == torch.int32
        length = int(cache_seqlens[0])
        key, value = (one_piece(x, page_table, length) for x in (k_cache, v_cache))
    return dense(QKV(q.transpose(1, 2), key, value)).unflatten(0, q.shape[:2])


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert cu_seq_k is None
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert cu_seq_q.tolist() == [row * max_q for row in range(len(block_table) + 1)]
    assert seqused_k.tolist() == [max_k] * len(block_table)
    query = query.unflatten(0, (-1, max_q)).transpose(1, 2)
    return dense(QKV(query, *(one_piece(x, block_table, max_k) for x in (key, value))))


class PagedWrapper:
    """What FlashInfer's two wrappers have in common."""

    def attend(self, q, pages, n):
        indptr, indices, last = self.tables
        assert all(x.dtype == torch.int32 for x in (indptr, indices, last))
        page_size = pages[0].shape[2]  # HND
        assert (*self.heads, q.shape[-1], page_size) == (HQ, HKV, D, PAGE)
        count = int(indptr[1])
        assert indptr.tolist() == [row * count for row in range(B + 1)]
        assert last.tolist() == [S - (count - 1) * page_size] * B
        table = indices.view(B, count)
        kv = (one_piece(x.transpose(1, 2), table, S) for x in pages)
        return dense(QKV(q.unflatten(0, (B, n)).transpose(1, 2), *kv))


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False,
        use_tensor_cores=False, paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
    ):  # fmt: skip
        assert not float_workspace_buffer.any()
        assert (kv_layout, use_cuda_graph, use_tensor_cores) == ("HND", True, True)
        self.buffers = (
            *(paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer),
        )

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        *, q_data_type="float16",
    ):  # fmt: skip
        assert q_data_type == torch.float32
        for buffer, x in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
            buffer.copy_(x)
        self.tables, self.heads = self.buffers, (num_qo_heads, num_kv_heads)

    def run(self, q, paged_kv_cache):
        return self.attend(q, paged_kv_cache, 1)


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "HND"

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, *, causal=False, q_data_type="float16",
    ):  # fmt: skip
        assert causal
        self.n = int(qo_indptr[1])
        assert qo_indptr.tolist() == [row * self.n for row in range(B + 1)]
        self.tables = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self.heads = num_qo_heads, num_kv_heads

    def run(self, q, paged_kv_cache):
        return self.attend(q, paged_kv_cache, self.n)


@pytest.fixture
def packages(monkeypatch):
    """Put stand-ins in the place of all packages; return their modules by name."""
    monkeypatch.setattr("benchmarking.paged_dense._WORKSPACE", 16)
    contents = {
        "flash_attn_interface": [flash_attn_with_kvcache],
        "flashinfer": [BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper],
        "torch.nn.attention.varlen": [varlen_attn],
    }
    modules = {}
    for name, members in contents.items():
        modules[name] = ModuleType(name)
        modules[name].__spec__ = ModuleSpec(name, None)
        vars(modules[name]).update({member.__name__: member for member in members})
        monkeypatch.setitem(sys.modules, name, modules[name])
    return modules


@pytest.mark.parametrize("n", [1, S], ids=["decode", "prompt"])
def test_every_dense_attention_over_pages_attends_to_all_tokens(packages, n):
    subjects, reasons = over_pages(n)
    assert reasons == {}
    assert [(subject.op, subject.variant) for subject in subjects] == [
        ("dense_paged", "sdpa_gathered"),
        ("dense", "flash_attn_3"),
        ("dense_paged", "flash_attn_3_paged"),
        ("dense_paged", "flashinfer_paged"),
        ("dense_paged", "varlen_attn_paged"),
    ]
    for subject in subjects:
        torch.testing.assert_close(subject.forward(), dense(inputs(n)))


def test_each_layer_attends_to_its_own_pages(packages):
    layers = [inputs(1), QKV(*(x.clone() for x in inputs(1)))]
    pages = [PagedAttention(qkv, small_config(), PAGE).pages for qkv in layers]
    runs = {}
    subjects, reasons = paged_dense_subjects(
        layers, pages, prepare=lambda some: runs.setdefault(len(runs), some), has_packages=True
    )
    assert reasons == {}
    assert len(runs) == len(subjects) == 5
    pages[0].both.zero_()  # a layer that read another's pages would change with them
    layers[0].key.zero_()
    for first, second in runs.values():
        assert not torch.allclose(first(), dense(inputs(1)))
        torch.testing.assert_close(second(), dense(inputs(1)))


def test_without_packages_only_gathers_are_tried(packages):
    subjects, reasons = over_pages(1, has_packages=False)
    assert [subject.variant for subject in subjects] == ["sdpa_gathered"]
    assert reasons == {}


def test_missing_packages_are_not_installed(monkeypatch):
    for name in ("flash_attn_interface", "fa3_fwd_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, None)
    _, reasons = over_pages(1)
    for name, package in PACKAGES.items():
        assert reasons[name] == f"not installed: {package}"


def test_the_second_name_of_flash_attention_3_is_tried(packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", packages["flash_attn_interface"])
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    subjects, _ = over_pages(1, names=["flash_attn_3_paged"])
    assert len(subjects) == 1


def test_a_package_that_was_built_without_pages_is_timed_over_one_piece(packages, monkeypatch):
    def unpaged(*args, page_table=None, **options):
        if page_table is not None:
            raise RuntimeError("This flash attention build does not support paged KV.\nbacktrace")
        return flash_attn_with_kvcache(*args, **options)

    monkeypatch.setattr(packages["flash_attn_interface"], "flash_attn_with_kvcache", unpaged)
    subjects, reasons = over_pages(1, names=["flash_attn_3", "flash_attn_3_paged"])
    assert [(subject.op, subject.variant) for subject in subjects] == [("dense", "flash_attn_3")]
    assert reasons == {
        "flash_attn_3_paged": "not supported: This flash attention build does not support paged KV."
    }


def test_a_pytorch_without_block_tables_is_another_version(packages, monkeypatch):
    def earlier(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        raise AssertionError

    monkeypatch.setattr(packages["torch.nn.attention.varlen"], "varlen_attn", earlier)
    reason = over_pages(1, names=["varlen_attn_paged"])[1]["varlen_attn_paged"]
    assert reason.startswith("wrong version: varlen_attn of torch ")
    assert "2.12" in reason


@pytest.mark.parametrize("row", [0, B - 1])
def test_a_wrong_row_is_not_timed(packages, monkeypatch, row):
    @functools.wraps(varlen_attn)
    def wrong(*args, **options):
        out = varlen_attn(*args, **options)
        out[row] *= 1.01
        return out

    monkeypatch.setattr(packages["torch.nn.attention.varlen"], "varlen_attn", wrong)
    subjects, reasons = over_pages(1, names=["varlen_attn_paged"])
    assert subjects == []
    assert reasons["varlen_attn_paged"].startswith(f"wrong: output of row {row}: error")


def test_attention_that_cannot_be_captured_is_not_timed(packages):
    def capture(runs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    subjects, reasons = over_pages(1, names=["flashinfer_paged"], prepare=capture)
    assert subjects == []
    assert reasons == {
        "flashinfer_paged": "not supported: operation not permitted when stream is capturing"
    }


def test_what_is_captured_is_timed(packages):
    subjects, _ = over_pages(1, names=["sdpa_gathered"], prepare=lambda runs: len)
    assert subjects[0].forward is len


def row(op, variant, ms, **cells):
    return dict.fromkeys(COLUMNS, "") | {
        "op": op, "variant": variant, "ms_p50": str(ms), "S": "8", "Hq": "32", "Hkv": "2", **cells
    }  # fmt: skip


ROWS = [
    row("infllm_attention", "decode", 2),
    row("infllm_attention", "decode_paged", 4),
    row("dense", "sdpa_cudnn", 10),
    row("dense", "sdpa_flash", 12),
    row("dense_paged", "sdpa_cudnn_gathered", 40),
    row("dense_paged", "flashinfer_paged", 16),
]


def test_attention_over_pages_is_compared_with_the_fastest_dense_one_over_pages():
    assert list(speed_ups(ROWS).values()) == [{"decode": 5.0, "decode_paged": 4.0}]
    header, lines = speed_table(ROWS)
    assert header[header.index("all ms") + 1 :] == [
        *("fastest over pages", "x pages", "sdpa_cudnn", "x", "sdpa_flash", "x"),
        *("sdpa_cudnn_gathered", "x", "flashinfer_paged", "x"),
    ]
    of_engine = {line[5]: line[header.index("all ms") :] for line in lines}
    assert of_engine == {
        "decode": ["2", "", "", "10", "5.00", "12", "6.00", "40", "", "16", ""],
        "decode_paged": [
            *("4", "flashinfer_paged", "4.00", "10", "2.50", "12", "3.00"),
            *("40", "10.00", "16", "4.00"),
        ],
    }


def test_without_dense_attention_over_pages_there_is_no_speed_up_of_pages():
    assert list(speed_ups(ROWS[:4]).values()) == [{"decode": 5.0}]
    assert "x pages" not in speed_table(ROWS[:4])[0]


def test_the_work_over_pages_is_that_over_one_piece(settings):
    (heads,) = settings.shapes.pairs
    for mode in ("forward", "decode"):
        over_one_piece = work_of("dense", mode, settings, heads, 256)
        assert work_of("dense_paged", mode, settings, heads, 256) == over_one_piece


def test_dense_attention_over_pages_is_timed(run_script, config, tmp_path):
    cases = (
        "cases={step: {lengths: [256], mode: decode, batch: 2, page_size: 32}, "
        "prompt: {lengths: [256], page_size: 32}}"
    )
    status, out, err = run_script("benchmark", "--config", config, cases)
    assert status == 0, err
    timed = {(row["op"], row["variant"], row["mode"]) for row in rows_of(tmp_path / "out.csv")}
    assert {
        ("dense_paged", "sdpa_gathered", "decode"),
        ("dense_paged", "sdpa_gathered", "forward"),
        ("dense", "sdpa", "decode"),
    } <= timed
    assert "fastest over pages" in out
