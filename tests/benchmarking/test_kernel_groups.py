"""Kernels are put into groups by name, and gaps are what no kernel fills."""

from __future__ import annotations

import pytest
import torch

from benchmarking.whole_models.kernel_groups import GROUPS, group_of
from benchmarking.whole_models.profile import Span, by_group, profile
from infllm_flex import infllm_attention
from tests.inputs import make_qkv, small_config


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>(Params)", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(Params)", "attention"),
        ("attend_specialized_kernel", "attention"),
        ("dkv_kernel", "attention"),
        ("split_kernel", "attention"),
        ("score_hopper_kernel", "selection"),
        ("_compress_keys_kernel", "selection"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
        ("triton_red_fused__to_copy_mean_mul_pow_rsqrt_1", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<unsigned short>", "copies"),
        ("something_new", "other"),
        ("infllm_flex::select_blocks", "selection"),
        ("infllm_flex::tile_blocks", "lists"),
        ("infllm_flex::attend_blocks", "attention"),
        ("aten::mm", "products"),
    ],
)
def test_a_kernel_belongs_to_its_group(name, group):
    assert group_of(name) == group


def test_gaps_are_what_no_kernel_of_any_stream_fills():
    spans = [
        Span("aten::mm", 0, 1000),
        Span("aten::add", 500, 2000),  # beside the first
        Span("dkv_kernel", 2500, 3000),
        Span("aten::add", 2600, 2700),
        Span("aten::add", 3000, 4000),
    ]
    times = by_group(reversed(spans))
    assert times["products"] == 1.0
    assert times["attention"] == 0.5
    assert times["elementwise"] == pytest.approx(1.5 + 0.1 + 1.0)
    assert times["gaps"] == 0.5
    assert set(times) == {*GROUPS, "gaps"}
    assert set(by_group([]).values()) == {0.0}


def test_operators_within_ours_count_for_our_stage():
    qkv = make_qkv(256)
    config = small_config(engine="fused")
    infllm_attention(*qkv, config)
    times = profile(lambda: infllm_attention(*qkv, config), torch.device("cpu"))
    assert times["selection"] > 0
    assert times["attention"] > 0
    assert times["products"] == 0  # all of them belong to a stage
    assert all(ms >= 0 for ms in times.values())
