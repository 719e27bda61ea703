"""Attention settings timed side by side, and the checks and least work of pooled queries."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch

from benchmarking import correctness
from benchmarking.inputs import QKV
from benchmarking.report import speed_table, speed_ups
from benchmarking.results import COLUMNS, read_results
from benchmarking.settings import BenchmarkSettings, FloorSettings, Heads
from benchmarking.work import Work, work_of
from infllm_flex import reference, select_blocks
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from tests.benchmarking.command import ROOT, rows_of
from tests.inputs import make_qkv as draw_qkv
from tests.inputs import small_config

EVERY_KEY = {
    "kernel_size": 1,
    "kernel_stride": 1,
    "pool_queries": True,
    "score_dtype": "float8",
}
VARIANTS = """variants={every_key: {kernel_size: 1, kernel_stride: 1, block_size: 16,
  window_size: 32, topk: 3, dense_len: -1, pool_queries: true, score_dtype: float8}}"""
STEP = "cases.step={lengths: [256], mode: decode}"


def test_attention_settings_are_timed_side_by_side(run_script, config, tmp_path):
    pytest.importorskip("matplotlib")
    status, out, err = run_script("benchmark", "--config", config, VARIANTS, STEP)
    assert status == 0, err
    rows = rows_of(tmp_path / "out.csv")
    measured = {(row["op"], row["settings"], row["mode"]) for row in rows}
    parts = ("forward", "backward", "forward+backward", "decode")
    assert measured == {
        *(("dense", "", mode) for mode in parts),
        *(("infllm_attention", name, mode) for name in ("", "every_key") for mode in parts),
        *(("attend", name, mode) for name in ("", "every_key") for mode in parts[:3]),
        *(("build_lists", name, mode) for name in ("", "every_key") for mode in parts[::2]),
        *(
            ("select_blocks", name, mode)
            for name in ("", "every_key")
            for mode in (*parts[::2], "decode")
        ),
    }
    assert len({row["date"] for row in rows}) == 1
    assert "x default" in out
    assert out.count("every_key") == 5  # its check, and its lines in the table
    assert run_script("plot", tmp_path / "out.csv")[0] == 0


def test_a_variant_is_compared_with_dense_and_with_the_default():
    shape = dict.fromkeys(COLUMNS, "") | {"S": "8", "Hq": "32", "Hkv": "2"}
    rows = [
        shape | {"op": op, "variant": variant, "settings": name, "ms_p50": ms}
        for op, variant, name, ms in (
            ("select_blocks", "", "", "1"),
            ("select_blocks", "", "fine", "3"),
            ("infllm_attention", "auto", "", "4"),
            ("infllm_attention", "auto", "fine", "5"),
            ("dense", "sdpa_cudnn", "", "20"),
        )
    ]
    header, lines = speed_table(rows)
    shown = [dict(zip(header, line, strict=True)) for line in lines]
    columns = ("engine", "settings", "select", "all ms", "x default", "x")
    assert [tuple(line[name] for name in columns) for line in shown] == [
        ("auto", "default", "1", "4", "1.00", "5.00"),
        ("auto", "fine", "3", "5", "0.80", "4.00"),
    ]
    assert list(speed_ups(rows).values()) == [{"auto": 5.0, "auto, fine": 4.0}]
    assert "x default" not in speed_table(rows[::2])[0]


def without_settings(path):
    """Rewrite a CSV as it was before settings were compared."""
    with path.open(newline="") as file:
        rows = [row[:2] + row[3:] for row in csv.reader(file)]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def test_a_csv_without_the_column_takes_rows_of_the_default_alone(run_script, config, tmp_path):
    once = ("benchmark", "--config", config, "cases={short: {lengths: [256]}}")
    assert run_script(*once)[0] == 0
    without_settings(tmp_path / "out.csv")
    before = (tmp_path / "out.csv").read_text()
    status, out, err = run_script(*once, VARIANTS)
    assert (status, out) == (2, "")
    assert "out.csv has no column 'settings', which variants need" in err
    assert (tmp_path / "out.csv").read_text() == before
    assert run_script(*once)[0] == 0
    assert (tmp_path / "out.csv").read_text().startswith(before)
    assert [row["op"] for row in rows_of(tmp_path / "out.csv")[::5]] == ["select_blocks"] * 2
    assert {row["settings"] for row in read_results(tmp_path / "out.csv")} == {""}


@pytest.mark.parametrize("name", ["bench_cpu", "bench_h100", "bench_h200"])
def test_earlier_results_are_read(name):
    rows = read_results(ROOT / "docs" / "results" / f"{name}.csv")
    ratios = [ratio for engines in speed_ups(rows).values() for ratio in engines.values()]
    assert ratios
    assert all(ratio > 0 for ratio in ratios)


def test_pooled_queries_need_one_product_per_group_and_no_coarse_keys(settings):
    S, heads = 256, Heads(4, 2)
    pooled = dataclasses.replace(settings, variants={"fine": small_config(**EVERY_KEY)})
    pooled = pooled.with_attention("fine")
    plain = work_of("select_blocks", "forward", settings, heads, S)
    fine = work_of("select_blocks", "forward", pooled, heads, S)
    # Four heads of 64 and 16 keys; two heads of 256 keys.
    assert fine.flops / plain.flops == (2 * 256) / (4 * 80)
    assert (plain.float8_flops, fine.float8_flops) == (0, fine.flops)
    assert fine.bytes == plain.bytes
    attend = work_of("attend", "forward", pooled, heads, S)
    both = work_of("infllm_attention", "forward", pooled, heads, S)
    assert both == (attend.flops + fine.flops, attend.bytes + fine.bytes, fine.flops)


def test_a_decode_step_by_every_key_reads_all_keys_once_more(settings):
    pooled = dataclasses.replace(settings, attention=small_config(**EVERY_KEY))
    heads, S, row = Heads(4, 2), 256, 2 * 16 * 4  # bytes of a key of both heads
    select, both, dense = (
        work_of(op, "decode", pooled, heads, S)
        for op in ("select_blocks", "infllm_attention", "dense")
    )
    assert select == (2 * 2 * 16 * S, row * S, 2 * 2 * 16 * S)
    assert both.bytes == row * (S + 2 * 5 * 16)
    assert both.flops == select.flops + 2 * 4 * 16 * 2 * 5 * 16
    assert dense == (2 * 4 * 16 * 2 * S, row * 2 * S, 0)


def test_products_of_float8_have_their_own_limit():
    work = Work(flops=3e12, bytes=0, float8_flops=2e12)
    assert work.floor_ms(FloorSettings(tflops=1, terabytes=1)) == 3000
    assert work.floor_ms(FloorSettings(tflops=1, terabytes=1, float8_tflops=2)) == 2000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variants={default: {dense_len: -1}}", "default is reserved for attention, got"),
        ("variants={other: {}}", "got a length of 256, below variants.other.dense_len = 8192"),
        ("variants={other: {pool_queries: true}}", "variants.other"),
    ],
)
def test_a_bad_variant_is_one_clear_line_and_status_2(run_script, config, override, message):
    status, out, err = run_script("benchmark", "--config", config, override)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_wrong_choice_of_a_variant_is_not_timed(run_script, config, tmp_path, monkeypatch):
    def spoiled(query, key, config):
        return select_blocks(-query if config.pool_queries else query, key, config)

    monkeypatch.setattr(correctness, "select_blocks", spoiled)
    status, _, err = run_script("benchmark", "--config", config, VARIANTS)
    assert status == 1
    assert "nothing was timed: select_blocks: token" in err
    assert not (tmp_path / "out.csv").exists()


def test_a_wrong_choice_of_a_decode_step_is_not_timed(run_script, config, monkeypatch):
    real = correctness.select_cached
    monkeypatch.setattr(correctness, "select_cached", lambda q, *a, **k: real(-q, *a, **k))
    status, _, err = run_script("benchmark", "--config", config, STEP)
    assert status == 1
    assert "nothing was timed: select_cached: token 335 of head" in err


def judge_choice(selected, q, k, config):
    correctness._check_selection("select_blocks", QKV(q, k, k), selected, config)


@pytest.mark.parametrize("score_dtype", ["same", "float8"])
@pytest.mark.parametrize("sign", [1, -1])
def test_pooled_scores_may_be_negative_and_differ_by_rounding(sign, score_dtype):
    """Keys have a common component, which puts all dot products on one side of zero."""
    config = small_config(**EVERY_KEY | {"score_dtype": score_dtype}, topk=4)
    common = torch.ones(16)
    q, k, _ = draw_qkv(1500, Hq=24, Hkv=8, dtype=torch.float64)
    q, k = (q + common).bfloat16(), (k + 3 * sign * common).bfloat16()
    # Queries that differ by half a bit stand for an operator that rounds in another place.
    random = torch.rand(q.shape, generator=torch.Generator().manual_seed(0))
    rounded = q.double() * (1 + (random - 0.5) * 2.0**-8)
    differing = select_blocks(rounded, k.double(), config)
    exact = select_blocks(q.double(), k.double(), config)
    assert (differing != exact)[:, :, -40:].any()
    judge_choice(differing, q, k, config)


def test_windows_that_are_rounded_twice_are_no_error():
    """Means of windows are rounded to bfloat16 before float8; those of the reference are not."""
    windows = {"kernel_size": 4, "kernel_stride": 4}
    config = small_config(**EVERY_KEY | windows, topk=20)
    q, k, _ = draw_qkv(1500, Hq=8, Hkv=8, dtype=torch.bfloat16)
    selected = select_blocks(q, k, config)
    expected = reference.select_blocks(q[:, :, -40:], k, config, scale=0.25)
    assert (selected[:, :, -40:] != expected).any()
    judge_choice(selected, q, k, config)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_pooled_choice_of_a_worse_block_is_found(sign):
    config = small_config(**EVERY_KEY)
    q, k, _ = draw_qkv(400, Hq=6)
    q, k = q + 1, k + 3 * sign
    selected = select_blocks(q, k, config)  # the first, one more, and 22, 23, 24
    judge_choice(selected, q, k, config)
    worse = selected.clone()
    worse[0, 1, -1, 1] = next(n for n in range(1, 22) if n != worse[0, 1, -1, 1])
    with pytest.raises(correctness.IncorrectError, match="token 399 of head 1 selects"):
        judge_choice(worse, q, k, config)


def test_a_choice_without_a_forced_block_is_found():
    config = small_config()
    q, k, _ = draw_qkv(400)
    k[:, :, :16] = 0  # so that the first block scores below all others
    q[..., 0], k[:, :, 16:, 0] = 9, 1
    selected = select_blocks(q, k, config)
    own = selected[0, 0, -1].tolist()
    selected[0, 0, -1, :2] = torch.tensor(sorted({own[1], own[1] % 20 + 1}))
    with pytest.raises(correctness.IncorrectError, match=r"instead of \[0\]"):
        judge_choice(selected, q, k, config)


@pytest.mark.parametrize("heads_and_dim", [(), ("shapes.heads=[9/3]", "shapes.head_dim=64")])
def test_the_config_that_compares_choices_is_complete(heads_and_dim):
    path = ROOT / "configs" / "bench_every_key.yaml"
    settings = build_dataclass(BenchmarkSettings, load_yaml(path, heads_and_dim))
    assert {case.mode for case in settings.cases.values()} == {
        "forward",
        "forward+backward",
        "decode",
    }
    asked = (65536, 131072, 524288)
    assert {name: case.lengths for name, case in settings.cases.items()} == {
        "forward": (32768, *asked),
        "training": asked,
        "decode": (32768, *asked),
    }
    every_key = dataclasses.replace(settings.attention, **EVERY_KEY)
    assert settings.variants == {
        "every_key": every_key,
        "every_key_d32": dataclasses.replace(every_key, score_dims=32),
    }
