"""Adapters of other packages: their arguments, their checks, and the words where they are missing.

None of the packages runs without a GPU. Stand-ins with their documented signatures compute what the
packages promise to compute.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarking.inputs import QKV, with_gradients
from benchmarking.report import speed_table
from benchmarking.results import COLUMNS
from benchmarking.rivals import rival_attentions
from infllm_flex import InfLLMConfig, reference, select_blocks
from tests.inputs import make_qkv

CONFIG = InfLLMConfig(window_size=128, topk=2, dense_len=-1)  # four blocks of 64
S, G = 384, 16
NAMES = {
    "infllm_v2": "infllm_v2_given_4_blocks",
    "flag_attn": "flag_attention_given_4_blocks",
    "flashinfer": "flashinfer_given_4_blocks",
    "cudnn": "cudnn_bsa_unions_of_4_blocks",
}


def inputs(Hkv=2):
    return QKV(*(x.float() for x in make_qkv(S, B=1, Hq=G * Hkv, Hkv=Hkv, D=32)))


def masked(q, k, v, mask):
    return reference.masked_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5).to(q.dtype)


def packed_attention(q, k, v, selected, block_size=64):
    """Attend causally to blocks ``[Hkv, S, K]`` of one packed sequence ``[S, H, D]``."""
    assert selected.dtype == torch.int32
    mask = reference.attention_mask(selected[None], block_size, len(k))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return masked(q, k, v, mask)[0].transpose(0, 1)


def infllmv2_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None, topk_idx=None,
):  # fmt: skip
    assert causal
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, max_seqlen_q]
    assert topk_idx.shape[:2] == (k.shape[1], max_seqlen_k)
    return packed_attention(q, k, v, topk_idx)


def sparse_attention(
    q, k, v, selected_blocks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, block_size=64,
    softmax_scale=None, causal=True,
):  # fmt: skip
    assert causal
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, max_seqlen_q]
    return packed_attention(q, k, v, selected_blocks, block_size)


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, *, causal=False, q_data_type="float16",
    ):  # fmt: skip
        tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(table.dtype == torch.int32 for table in tables)
        assert qo_indptr.tolist() == list(range(len(paged_kv_indptr)))  # one query to a request
        assert int(paged_kv_indptr[-1]) == len(paged_kv_indices)
        assert num_kv_heads == 1
        self.tables, self.page_size = tables, page_size

    def run(self, q, paged_kv_cache):
        _, starts, indices, last = self.tables
        keys, values = (pages[:, :, 0] for pages in paged_kv_cache)  # [pages, page_size, D]
        out = torch.empty_like(q)
        for row, query in enumerate(q):
            pages = indices[starts[row] : starts[row + 1]].long()
            length = (len(pages) - 1) * self.page_size + int(last[row])
            k, v = (x[pages].flatten(0, 1)[:length] for x in (keys, values))
            out[row] = (query @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v
        return out


def block_sparse_attention_forward(
    q_tensor, k_tensor, v_tensor, q2k_block_index, block_sparse_num=None, block_sizes=None,
    q2k_block_nums=None, *, sparse_block_size=None, softmax_scale=None,
):  # fmt: skip
    size, rows = sparse_block_size, q_tensor.shape[2]
    assert q2k_block_index.shape[:3] == q2k_block_nums.shape == (*q_tensor.shape[:2], rows // size)
    used = torch.arange(q2k_block_index.shape[-1]) < q2k_block_nums[..., None]
    blocks = torch.arange(k_tensor.shape[2]) // size
    listed = (q2k_block_index.masked_fill(~used, -1)[..., None] == blocks).any(-2)
    out = masked(q_tensor, k_tensor, v_tensor, listed.repeat_interleave(size, 2))
    return out, None


@pytest.fixture
def packages(monkeypatch):
    """Put stand-ins in the place of all packages; return their modules by package."""
    contents = {
        "infllm_v2": {"infllmv2_attn_varlen_func": infllmv2_attn_varlen_func},
        "flag_attn": {},
        "flag_attn.infllmv2": {},
        "flag_attn.infllmv2.forward": {"sparse_attention": sparse_attention},
        "flashinfer": {"BatchPrefillWithPagedKVCacheWrapper": BatchPrefillWithPagedKVCacheWrapper},
        "cudnn": {
            "BSA": SimpleNamespace(block_sparse_attention_forward=block_sparse_attention_forward)
        },
    }
    modules = {}
    for name, members in contents.items():
        modules[name] = ModuleType(name)
        modules[name].__spec__ = ModuleSpec(name, None)
        vars(modules[name]).update(members)
        monkeypatch.setitem(sys.modules, name, modules[name])
    return modules


@pytest.fixture
def no_packages(monkeypatch):
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)


def test_missing_packages_are_not_installed(no_packages):
    available, reasons = rival_attentions(inputs(), CONFIG)
    assert available == {}
    assert reasons == {name: f"not installed: {package}" for package, name in NAMES.items()}


def test_every_package_passes_its_check_and_runs(packages):
    available, reasons = rival_attentions(inputs(), CONFIG)
    assert reasons == {}
    assert set(available) == set(NAMES.values())
    for rival in available.values():
        assert rival.attend().isfinite().all()


def test_gradients_are_checked_where_a_package_has_them(packages):
    qkv = with_gradients(inputs())
    available, reasons = rival_attentions(qkv, CONFIG)
    assert set(available) == {NAMES["infllm_v2"], NAMES["flag_attn"]}
    assert set(reasons.values()) == {"not supported: forward only"}
    rival = available[NAMES["infllm_v2"]]
    gradients = torch.autograd.grad(rival.attend().sum(), rival.qkv)
    assert gradients[0].shape == (S, 2 * G, 32)


def test_wrong_gradients_are_not_timed(packages, monkeypatch):
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    def spoiled(*args, **kwargs):
        return Half.apply(sparse_attention(*args, **kwargs))

    monkeypatch.setattr(packages["flag_attn.infllmv2.forward"], "sparse_attention", spoiled)
    _, reasons = rival_attentions(with_gradients(inputs()), CONFIG)
    assert reasons[NAMES["flag_attn"]].startswith("wrong: dq differs from ours by 0.5")


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("infllm_v2", "infllmv2_attn_varlen_func"),
        ("flag_attn.infllmv2.forward", "sparse_attention"),
    ],
)
def test_wrong_numbers_are_not_timed(packages, monkeypatch, module, function):
    original = getattr(packages[module], function)
    monkeypatch.setattr(packages[module], function, lambda *a, **k: original(*a, **k) * 1.01)
    available, reasons = rival_attentions(inputs(), CONFIG)
    assert len(available) == 3
    assert next(iter(reasons.values())).startswith("wrong: output: error")


def test_a_union_that_leaves_out_a_block_is_found(packages, monkeypatch):
    def fewer(*args, q2k_block_nums, **kwargs):
        nums = (q2k_block_nums - 1).clamp(min=1)
        return block_sparse_attention_forward(*args, q2k_block_nums=nums, **kwargs)

    monkeypatch.setattr(packages["cudnn"].BSA, "block_sparse_attention_forward", fewer)
    assert rival_attentions(inputs(), CONFIG)[1][NAMES["cudnn"]].startswith("wrong: output")


def test_other_signatures_are_another_version(packages, monkeypatch):
    monkeypatch.delattr(packages["infllm_v2"], "infllmv2_attn_varlen_func")
    monkeypatch.setattr(
        packages["flag_attn.infllmv2.forward"], "sparse_attention", lambda q, k, v: q
    )
    monkeypatch.setitem(sys.modules, "flag_attn.infllmv2", None)
    monkeypatch.delitem(sys.modules, "flag_attn.infllmv2.forward")
    reasons = rival_attentions(inputs(), CONFIG)[1]
    assert set(reasons) == {NAMES["infllm_v2"], NAMES["flag_attn"]}
    assert all(reason.startswith("wrong version: ") for reason in reasons.values())


def test_shapes_that_a_package_refuses_are_not_supported(packages, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("head size 32\nis too small")

    monkeypatch.setattr(packages["infllm_v2"], "infllmv2_attn_varlen_func", refuse)
    two_rows = QKV(*(x.repeat(2, 1, 1, 1) for x in inputs()))
    reasons = rival_attentions(inputs(), CONFIG)[1]
    assert reasons == {NAMES["infllm_v2"]: "not supported: head size 32"}
    assert set(rival_attentions(two_rows, CONFIG)[1].values()) == {
        "not supported: expected batch 1, got 2"
    }


def test_memory_that_is_missing_is_a_word(packages, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packages["infllm_v2"], "infllmv2_attn_varlen_func", fail)
    assert rival_attentions(inputs(), CONFIG)[1] == {NAMES["infllm_v2"]: "out of memory"}


def test_only_named_packages_are_tried(packages):
    assert list(rival_attentions(inputs(), CONFIG, [NAMES["cudnn"]])[0]) == [NAMES["cudnn"]]


def test_the_table_has_a_word_where_there_is_no_time():
    shape = dict.fromkeys(COLUMNS, "") | {"S": "8", "Hq": "32", "Hkv": "2"}
    rows = [
        shape | {"op": op, "variant": variant, "ms_p50": ms}
        for op, variant, ms in (
            ("infllm_attention", "auto", "2"),
            ("rival", "flashinfer_given_4_blocks", "4"),
        )
    ]
    key = ("", "", "", "32", "2", "", "", "", "8")
    reasons = {key: {"infllm_v2_given_4_blocks": "not installed: infllm_v2"}}
    header, (line,) = speed_table(rows, reasons)
    assert header[-4:] == ["flashinfer_given_4_blocks", "x", "infllm_v2_given_4_blocks", "x"]
    assert line[-4:] == ["4", "2.00", "not installed", ""]


def test_our_selection_includes_a_tokens_own_block_last():
    selected = select_blocks(*inputs()[:2], CONFIG)
    last = selected.amax(-1)
    assert torch.equal(last[0, 0], torch.arange(S, dtype=torch.int32) // 64)
