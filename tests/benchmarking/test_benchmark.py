"""The benchmark's command: refused settings, written rows, and their consistency."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from benchmarking import correctness, timing
from benchmarking.results import COLUMNS
from benchmarking.settings import BenchmarkSettings, CaseSettings, MemorySettings
from infllm_flex import infllm_attention, select_blocks
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from tests.benchmarking.command import ROOT, rows_of


def test_a_run_times_every_stage_and_the_sum_beside_dense(run_script, config, tmp_path):
    status, out, err = run_script("benchmark", "--config", config)
    assert status == 0, err
    rows = rows_of(tmp_path / "out.csv")
    assert tuple(rows[0]) == COLUMNS
    measured = {(row["op"], row["variant"], row["mode"]) for row in rows}
    forward, both = "forward", "forward+backward"
    assert measured == {
        *(("select_blocks", "", mode) for mode in (forward, both)),
        *(("build_lists", "fused", mode) for mode in (forward, both)),
        *(("attend", "fused", mode) for mode in (forward, "backward", both)),
        *(("infllm_attention", "fused", mode) for mode in (forward, "backward", both)),
        *(("dense", "sdpa", mode) for mode in (forward, "backward", both)),
    }
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert (row["B"], row["Hq"], row["Hkv"], row["S"], row["D"]) == ("1", "4", "2", "256", "16")
        assert row["torch"] == torch.__version__
        assert row["commit"]
        assert row["date"]
    assert "x: speed-up over the attention left of it" in out
    assert f"{len(rows)} rows added" in out


def test_tiles_of_other_sizes_say_how_much_they_load(run_script, config, tmp_path):
    case = "cases={tiles: {lengths: [256], tile_rows: [1, 2, 16, 256]}}"
    assert run_script("benchmark", "--config", config, case)[0] == 0
    rows = [row for row in rows_of(tmp_path / "out.csv") if row["op"] == "attend_blocks"]
    sizes, inflation = zip(*(row["variant"].split(" rows, u = ") for row in rows), strict=True)
    assert sizes == ("2", "16")  # 1 row is less than a token; 256 are more than a word has bits
    assert inflation[0] == "1.00"
    assert float(inflation[1]) > 1
    assert all(float(row["ms_p50"]) > 0 for row in rows)


def test_rows_are_added_below_those_that_are_there(run_script, config, tmp_path):
    once = ("benchmark", "--config", config, "cases={short: {lengths: [256]}}")
    assert run_script(*once)[0] == 0
    before = (tmp_path / "out.csv").read_text()
    assert run_script(*once)[0] == 0
    after = (tmp_path / "out.csv").read_text()
    assert after.startswith(before)
    assert len(rows_of(tmp_path / "out.csv")) == 2 * (len(before.splitlines()) - 1)


def test_a_csv_of_something_else_is_left_alone(run_script, config, tmp_path):
    (tmp_path / "out.csv").write_text("a,b\n1,2\n")
    status, _, err = run_script("benchmark", "--config", config)
    assert status == 2
    assert "out.csv has other columns than this benchmark writes" in err
    assert (tmp_path / "out.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.round=3", "run.round: unknown key (did you mean rounds?)"),
        ("shapes.heads=[8/3]", "the first a multiple of the second, got 8/3"),
        ("cases.short.lengths=[0]", "cases.short.lengths: must be between 1 and"),
        (
            "cases.short.mode=backward",
            "expected one of forward, forward+backward, decode, got backward",
        ),
        ("cases.short.batch=0", "cases.short.batch: must be between 1 and"),
        ("cases.short.layers=2", "cases.short.layers: must be 1 where mode is forward, got 2"),
        ("attention.dense_len=512", "got a length of 256, below attention.dense_len = 512"),
        ("run.out=results.txt", "run.out: must name a .csv file, got results.txt"),
        ("engines=[]", "engines: must name at least one engine, none twice, got []"),
    ],
)
def test_a_bad_setting_is_one_clear_line_and_status_2(run_script, config, override, message):
    status, out, err = run_script("benchmark", "--config", config, override)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [None, "", "- a\n"])
def test_a_file_that_is_no_config_is_one_line_and_status_2(run_script, tmp_path, content):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    status, _, err = run_script("benchmark", "--config", path)
    assert status == 2
    assert err.startswith(str(path))
    assert err.count("\n") == 1


def spoil_attention(monkeypatch):
    def spoiled(*args, **kwargs):
        return infllm_attention(*args, **kwargs) * 1.01

    monkeypatch.setattr(correctness, "infllm_attention", spoiled)
    return "infllm_attention (fused, output without gradients): error"


def spoil_training(monkeypatch):
    def spoiled(query, *args, **kwargs):
        out = infllm_attention(query, *args, **kwargs)
        return out * 1.01 if query.requires_grad else out

    monkeypatch.setattr(correctness, "infllm_attention", spoiled)
    return "infllm_attention (fused, output): error"


def spoil_choice(monkeypatch):
    def spoiled(*args, **kwargs):
        selected = select_blocks(*args, **kwargs).clone()
        selected[..., 1] = selected[..., 0]
        return selected

    monkeypatch.setattr(correctness, "select_blocks", spoiled)
    return "ascending blocks, got "


def spoil_scores(monkeypatch):
    def spoiled(query, key, config):
        return select_blocks(-query, key, config)

    monkeypatch.setattr(correctness, "select_blocks", spoiled)
    return " instead of "


@pytest.mark.parametrize("spoil", [spoil_attention, spoil_training, spoil_choice, spoil_scores])
def test_wrong_operators_are_not_timed(run_script, config, tmp_path, monkeypatch, spoil):
    message = spoil(monkeypatch)
    status, _, err = run_script("benchmark", "--config", config)
    assert status == 1
    assert err.startswith("error: nothing was timed: ")
    assert message in err
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("cases", "wrong"),
    [
        ({"a": "forward"}, "gradients"),
        ({"a": "decode"}, "prompts"),
        ({"a": "decode", "b": "forward"}, "gradients"),
    ],
)
def test_what_is_not_timed_is_not_checked(settings, monkeypatch, cases, wrong):
    """Kernels of other modes would take minutes to compile on a GPU."""
    some = {name: CaseSettings(mode=mode, lengths=(256,)) for name, mode in cases.items()}
    some["unused"] = CaseSettings(mode="forward+backward", lengths=())
    settings = dataclasses.replace(
        settings, cases=some, memory=MemorySettings(), models={}, engines=("fused",)
    )
    assert settings.timed_modes == set(cases.values())

    def spoiled(query, *args, **kwargs):
        assert wrong == "gradients"
        assert not query.requires_grad
        return infllm_attention(query, *args, **kwargs)

    monkeypatch.setattr(correctness, "infllm_attention", spoiled)
    correctness.check_operators(settings, settings.shapes.pairs[0])


def test_a_run_of_no_cases_is_checked_with_gradients(settings):
    none = dataclasses.replace(settings, cases={}, memory=MemorySettings(), models={})
    assert none.timed_modes == {"forward+backward"}


def test_failing_tests_are_not_timed(run_script, config, tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_it():\n    assert 1 == 2\n")
    status, _, err = run_script("benchmark", "--config", config, f"run.tests=[{failing}]")
    assert status == 1
    assert "nothing was timed" in err
    assert "assert 1 == 2" in err
    assert not (tmp_path / "out.csv").exists()


def test_what_was_measured_before_ctrl_c_is_kept(run_script, config, tmp_path, monkeypatch):
    real, calls = timing.time_in_rotation, itertools.count()

    def interrupted(*args):
        if next(calls):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(timing, "time_in_rotation", interrupted)
    status, out, err = run_script("benchmark", "--config", config)
    assert status == 130
    assert "earlier measurements are in" in err
    assert "5 rows added" in out
    assert len(rows_of(tmp_path / "out.csv")) == 5


def test_a_missing_gpu_is_said_in_one_line(run_script, config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run_script("benchmark", "--config", config, "run.device=cuda")
    assert status == 2
    assert err == "run.device: cuda is not available here; set run.device=cpu\n"


def test_models_and_memory_are_held_to_their_limits(run_script, config, tmp_path):
    pytest.importorskip("transformers")
    status, out, err = run_script(
        *("benchmark", "--config", config, "cases={}", "memory.lengths=[8192]"),
        "models={tiny: {length: 64, hidden_size: 32, num_layers: 1, rounds: 2, limit: 1000}}",
    )
    assert status == 0, err
    memory, *models = rows_of(tmp_path / "out.csv")
    assert memory["ms_p50"] == ""
    assert float(memory["peak_mib"]) > 0
    assert [row["variant"] for row in models] == ["unpatched", "patched"]
    assert "patched over unpatched time" in out
    assert "peak memory of forward and backward, 4/2 heads, 8192 tokens" in out
    assert out.count(": reached") == 2


@pytest.mark.parametrize("name", ["bench_cpu.yaml", "bench_h200.yaml"])
def test_the_configs_are_complete(name):
    settings = build_dataclass(BenchmarkSettings, load_yaml(ROOT / "configs" / name))
    assert settings.cases
    assert {case.inputs for case in settings.cases.values()} <= {"text", "drifting", "independent"}
    assert settings.models["below_dense_len"].limit == 1.02


def test_both_pictures_are_drawn_beside_the_csv(run_script, config, tmp_path):
    pytest.importorskip("matplotlib")
    assert run_script("benchmark", "--config", config)[0] == 0
    status, out, err = run_script("plot", tmp_path / "out.csv")
    assert status == 0, err
    for name in ("out_speed_up.png", "out_stages.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in out


def test_what_is_no_result_is_not_drawn(run_script, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n")
    status, _, err = run_script("plot", tmp_path / "x.csv")
    assert status == 2
    assert "has other columns" in err


def test_a_decode_step_is_timed_beside_dense_over_the_same_cache(run_script, config, tmp_path):
    case = "cases={step: {lengths: [256], mode: decode, batch: 2}}"
    floor = "floor={tflops: 1, terabytes: 0.01}"
    status, out, err = run_script("benchmark", "--config", config, case, floor)
    assert status == 0, err
    rows = {(row["op"], row["variant"]): row for row in rows_of(tmp_path / "out.csv")}
    ours, dense = rows["infllm_attention", "decode"], rows["dense", "sdpa"]
    assert set(rows) == {
        ("select_blocks", ""),
        ("infllm_attention", "decode"),
        ("dense", "sdpa"),
    }
    assert {row["mode"] for row in rows.values()} == {"decode"}
    assert {row["B"] for row in rows.values()} == {"2"}
    # 256 / 4 compressed keys and a quarter of them again, twice 5 blocks of 16; twice 256.
    assert float(ours["ms_floor"]) / float(dense["ms_floor"]) == pytest.approx(
        (80 + 160) / 512, 1e-4
    )
    assert "decode" in out


def test_steps_of_several_layers_have_rows_of_their_own(run_script, config, tmp_path):
    case = "cases={step: {lengths: [256], mode: decode, layers: 3, page_size: 32}}"
    floor = "floor={tflops: 1, terabytes: 0.01}"
    status, out, err = run_script("benchmark", "--config", config, case, floor)
    assert status == 0, err
    rows = rows_of(tmp_path / "out.csv")
    assert {row["mode"] for row in rows} == {"decode_of_3_layers"}
    assert {row["op"] for row in rows} >= {"infllm_attention", "dense", "dense_paged"}
    # The floor is that of one step: 256 keys and values of 2 heads, 16 float32 numbers each.
    [dense] = [row for row in rows if row["op"] == "dense"]
    assert float(dense["ms_floor"]) == pytest.approx(1e3 * 2 * 256 * 2 * 16 * 4 / 0.01e12, 1e-3)
    assert "decode_of_3_layers" in out


def test_pages_are_timed_beside_one_piece(run_script, config, tmp_path):
    cases = (
        "cases={step: {lengths: [256], mode: decode, batch: 2, page_size: 32}, "
        "prompt: {lengths: [256], page_size: 32}}"
    )
    every_key = (
        "variants={every_key: {kernel_size: 1, kernel_stride: 1, pool_queries: true, "
        "block_size: 16, window_size: 32, topk: 3, dense_len: -1}}"
    )
    status, _, err = run_script("benchmark", "--config", config, cases, every_key)
    assert status == 0, err
    rows = rows_of(tmp_path / "out.csv")
    for settings in ("", "every_key"):
        timed = {
            (row["op"], row["variant"], row["mode"]) for row in rows if row["settings"] == settings
        }
        assert {
            ("infllm_attention", "decode", "decode"),
            ("infllm_attention", "decode_paged", "decode"),
            ("infllm_attention", "fused", "forward"),
            ("infllm_attention", "paged", "forward"),
        } <= timed


def test_pages_that_do_not_serve_a_setting_are_named(run_script, config, tmp_path):
    case = "cases={step: {lengths: [256], mode: decode, page_size: 32}}"
    status, _, err = run_script("benchmark", "--config", config, case, "attention.use_nope=true")
    assert status == 2
    assert "need other attention: use_nope is not served from pages" in err
