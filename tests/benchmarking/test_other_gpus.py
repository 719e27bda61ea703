"""Kernels on GPUs that are not here: their inner loops, and times predicted from them."""

from __future__ import annotations

import pytest
import torch

from benchmarking.other_gpus.cards import H100, H200, OTHERS
from benchmarking.other_gpus.prediction import (
    ATTEND,
    BACKWARD,
    DECODE,
    SELECT,
    Case,
    Fit,
    Model,
    cases_of,
    inflation_of,
)
from benchmarking.other_gpus.resources import KernelUse
from benchmarking.results import COLUMNS
from benchmarking.sass import Loop, inner_loop
from benchmarking.settings import Heads
from tests.benchmarking.command import rows_of

# Opcodes and labels as nvdisasm prints them.
LISTING = """\
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/              @!P0 LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   FADD R1, R1, R2 ;
        /*0090*/                   FADD R1, R1, R2 ;
        /*00a0*/                   FADD R1, R1, R2 ;
        /*00b0*/                   FADD R1, R1, R2 ;
        /*00c0*/                   FADD R1, R1, R2 ;
        /*00d0*/               @P2 BRA `(.L_x_2) ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
"""


def use(kernel, capability=90, rows=64, instructions=400, group=16, warps=4):
    return KernelUse(
        "attention", kernel, group, capability, rows, 64, warps, 128, 0, 1024, instructions, 8
    )


def model_of(settings, *uses, inflation=1.25):
    return Model(settings, uses, {16: inflation})


def test_the_inner_loop_is_the_one_with_the_products():
    assert inner_loop(LISTING) == Loop(instructions=4, products=2)


def test_without_products_the_longest_inner_loop_counts():
    assert inner_loop(LISTING.replace("HMMA", "FFMA")) == Loop(instructions=6, products=0)


def test_a_kernel_without_loops_has_no_step():
    assert inner_loop(LISTING.partition(".L_x_0")[0]) is None
    assert inner_loop(".L_x_3:\n        /*00f0*/    BRA `(.L_x_3);\n") is None


def test_bounds_are_the_cycles_of_all_steps(settings):
    # 16 dims in the test's settings: a step has 2 * 2 * 64 * 64 * 16 operations, 64 cycles.
    case = Case(ATTEND, Heads(32, 2), 4096)
    bounds = model_of(settings, use("attend_kernel", instructions=100)).bounds(case, H100)
    slow = model_of(settings, use("attend_kernel", instructions=400)).bounds(case, H100)
    assert bounds.serial / bounds.overlapped == pytest.approx((64 + 100) / 100)
    assert slow.overlapped / bounds.overlapped == pytest.approx(4)
    wide = model_of(settings, use("attend_kernel", rows=128, instructions=100, warps=8))
    assert wide.bounds(case, H100).overlapped == pytest.approx(bounds.overlapped)
    double = model_of(settings, use("attend_kernel", instructions=100), inflation=2.5)
    assert double.bounds(case, H100).serial == pytest.approx(2 * bounds.serial)


def test_a_card_without_other_instructions_reaches_its_peak(settings):
    case = Case(BACKWARD, Heads(32, 2), 4096)
    kernels = [use(name, instructions=0) for name in ("dq_kernel", "dkv_kernel")]
    bounds = model_of(settings, *kernels, inflation=1.0).bounds(case, H100)
    from benchmarking.work import visible_pairs

    flops = 7 * 2 * visible_pairs(settings.attention, 4096) * 32 * 16
    assert bounds.overlapped == bounds.serial == pytest.approx(1e3 * flops / H100.tflops / 1e12)


def test_a_fit_on_one_card_predicts_it_and_another(settings):
    kernels = [use(name) for name in ("attend_kernel", "dq_kernel", "dkv_kernel")]
    model = model_of(settings, *kernels)
    factors = {(ATTEND, 16, S): 1.2 + S / 1e6 for S in (32768, 131072)}
    factors |= {(BACKWARD, 16, S): 1.4 for S in (32768, 131072)}
    truth = Fit(factors, {16: 0.4}, 0.02, 1.5)
    shapes = [
        Case(what, Heads(32, 2), S, batch)
        for what in (ATTEND, BACKWARD, SELECT, DECODE)
        for S in (32768, 131072)
        for batch in (1, 16)
    ]
    measured = [case._replace(measured=model.predict(case, H100, truth)) for case in shapes]
    fit = model.fit(measured, H100)
    assert fit.constant == pytest.approx(0.02)
    assert fit.slowness == pytest.approx(1.5)
    assert fit.fraction == pytest.approx({16: 0.4})
    assert fit.factors == pytest.approx(truth.factors)
    for case in shapes:
        assert model.predict(case, H200, fit) == pytest.approx(model.predict(case, H200, truth))


def test_memory_decides_a_decode_step_and_products_an_attention(settings):
    model = model_of(settings, use("attend_kernel"))
    fit = Fit({(ATTEND, 16, 65536): 1.5}, {}, 0.0, 1.0)
    step, attention = Case(DECODE, Heads(32, 2), 65536), Case(ATTEND, Heads(32, 2), 65536)
    ratio = model.predict(step, H100, fit) / model.predict(step, H200, fit)
    assert ratio == pytest.approx(4.8 / 3.35)
    assert model.predict(attention, H100, fit) == model.predict(attention, H200, fit)
    assert model.predict(attention._replace(S=32768), H100, fit) is None


def test_the_newest_measurement_of_a_card_counts():
    row = dict.fromkeys(COLUMNS, "") | {"device": H100.device, "Hq": "32", "Hkv": "2", "B": "1"}
    row |= {"op": "attend", "variant": "auto", "mode": "forward", "inputs": "text", "S": "65536"}
    rows = [
        row | {"ms_p50": "20"},
        row | {"ms_p50": "16"},
        row | {"ms_p50": "9", "inputs": "independent"},
        row | {"ms_p50": "9", "device": H200.device},
        row | {"ms_p50": "9", "variant": "flex"},
        row | {"ms_p50": "", "S": "131072"},
    ]
    assert cases_of(rows, H100) == [Case(ATTEND, Heads(32, 2), 65536, 1, 16.0)]


def test_what_tiles_load_is_read_from_rows_of_tilings():
    row = dict.fromkeys(COLUMNS, "") | {"op": "attend_blocks", "Hq": "32", "Hkv": "8"}
    variants = "32 rows, u = 1.80", "64 rows, u = 2.09", "128 rows, u = 2.39"
    assert inflation_of(row | {"variant": variant} for variant in variants) == {4: 2.09}


def test_clocks_follow_from_the_published_peaks():
    for card in (H100, H200, *OTHERS):
        assert 1.3e9 < card.hertz < 2.6e9
        assert card.source


@pytest.mark.parametrize("group", [16, 4, 1])
@pytest.mark.parametrize("capability", [80, 90])
def test_every_launch_of_a_stage_is_recorded(capability, group, monkeypatch):
    pytest.importorskip("triton")
    from benchmarking.ahead_of_time import record_launches
    from benchmarking.other_gpus import launches

    kernels = {
        launch.kernel.__name__.lstrip("_")
        for stage in (launches.select, launches.attend, launches.decode)
        for launch in record_launches(monkeypatch, lambda stage=stage: stage(group), capability)
    }
    attend = "attend_specialized_kernel" if capability == 90 else "attend_kernel"
    assert {attend, "dq_kernel", "dkv_kernel", "tile_blocks_kernel", "lse_kernel"} <= kernels
    assert {"topk_kernel", "split_kernel", "join_kernel", "append_kernel"} <= kernels


def test_a_table_that_is_there_is_read_instead_of_compiled(run_script, tmp_path, monkeypatch):
    names = KernelUse._fields
    kinds = [use("attend_kernel", c) for c in (80, 89, 100)]
    kinds += [use("attend_specialized_kernel", 90, group=G) for G in (16, 4)]
    kinds += [use(n, c) for n in ("dq_kernel", "dkv_kernel") for c in (80, 89, 90, 100)]
    lines = [",".join(names), *(",".join(map(str, kind)) for kind in kinds)]
    (tmp_path / "kernels.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run_script("other_gpus", "--reuse", "--folder", tmp_path)
    assert status == 0, err
    assert "128 / 0 / 1 / 400" in out
    assert "predicted ms, 32/2 heads" in out
    rows = rows_of(tmp_path / "predicted_times.csv")
    assert {row["card"] for row in rows} == {card.name for card in (H100, H200, *OTHERS)}
    assert {row["what"] for row in rows} == {ATTEND, BACKWARD, SELECT, DECODE}
    for row in rows:
        assert float(row["ms"]) > 0
        assert bool(row["ms_measured"]) == row["card"].startswith("H")


def test_without_a_table_reuse_is_refused(run_script, tmp_path):
    status, _, err = run_script("other_gpus", "--reuse", "--folder", tmp_path)
    assert status == 2
    assert "kernels.csv" in err
