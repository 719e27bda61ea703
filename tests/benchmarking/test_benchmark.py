"""The benchmark's command: what it refuses, what it writes, and that the numbers add up."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import infllm_flex_ops
from benchmarking import correctness, timing
from benchmarking.dense import _dense_flex
from benchmarking.inputs import QKV, make_qkv
from benchmarking.memory import limit_mib, tensors_mib
from benchmarking.report import What, by_shape, speed_ups
from benchmarking.results import COLUMNS
from benchmarking.settings import BenchmarkSettings, Heads
from benchmarking.stages import engine_steps
from benchmarking.timing import Limits, Subject, time_by_turns
from benchmarking.work import visible_pairs, work_of
from infllm_flex import InfLLMConfig, infllm_attention, select_blocks
from infllm_flex.reference import attention_mask
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from infllm_flex_ops.block_lists import union_lists
from tests.benchmarking.command import ROOT, rows_of, script_runner, write_config
from tests.inputs import make_qkv as draw_qkv
from tests.inputs import small_config


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def run_script(monkeypatch, capsys):
    return script_runner(monkeypatch, capsys)


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
    assert "x: the attention before it over ours" in out
    assert f"{len(rows)} rows added" in out


def test_tiles_of_other_sizes_say_how_much_they_load(run_script, config, tmp_path):
    case = "cases={tiles: {lengths: [256], tile_rows: [1, 2, 16, 256]}}"
    assert run_script("benchmark", "--config", config, case)[0] == 0
    rows = [row for row in rows_of(tmp_path / "out.csv") if row["op"] == "attend_blocks"]
    sizes, inflation = zip(*(row["variant"].split(" rows, u = ") for row in rows), strict=True)
    assert sizes == ("2", "16")  # one row is less than a token, 256 are more than a word has bits
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
        ("attention.dense_len=512", "got a length of 256, below attention.dense_len = 512"),
        ("run.out=results.txt", "run.out: must name a .csv file, got results.txt"),
        ("engines=[]", "engines: must be one or more, each once, got []"),
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
    return r"infllm_attention (fused, output): error"


def spoil_choice(monkeypatch):
    def spoiled(*args, **kwargs):
        selected = select_blocks(*args, **kwargs).clone()
        selected[..., 1] = selected[..., 0]
        return selected

    monkeypatch.setattr(correctness, "select_blocks", spoiled)
    return "is not an ascending choice"


def spoil_scores(monkeypatch):
    def spoiled(query, key, config):
        return select_blocks(-query, key, config)

    monkeypatch.setattr(correctness, "select_blocks", spoiled)
    return "chosen instead of"


@pytest.mark.parametrize("spoil", [spoil_attention, spoil_choice, spoil_scores])
def test_wrong_operators_are_not_timed(run_script, config, tmp_path, monkeypatch, spoil):
    message = spoil(monkeypatch)
    status, _, err = run_script("benchmark", "--config", config)
    assert status == 1
    assert err.startswith("error: nothing was timed: ")
    assert message in err
    assert not (tmp_path / "out.csv").exists()


def test_failing_tests_are_not_timed(run_script, config, tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_it():\n    assert 1 == 2\n")
    status, _, err = run_script("benchmark", "--config", config, f"run.tests=[{failing}]")
    assert status == 1
    assert "nothing was timed" in err
    assert "assert 1 == 2" in err
    assert not (tmp_path / "out.csv").exists()


def test_what_was_measured_before_ctrl_c_is_kept(run_script, config, tmp_path, monkeypatch):
    real, calls = timing.time_by_turns, itertools.count()

    def interrupted(*args):
        if next(calls):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(timing, "time_by_turns", interrupted)
    status, out, err = run_script("benchmark", "--config", config)
    assert status == 130
    assert "what was measured is in" in err
    assert "5 rows added" in out
    assert len(rows_of(tmp_path / "out.csv")) == 5


def test_a_missing_gpu_is_said_in_one_line(run_script, config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run_script("benchmark", "--config", config, "run.device=cuda")
    assert status == 1
    assert err == "error: run.device: cuda is not available here\n"


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


@pytest.fixture
def settings(config):
    return build_dataclass(BenchmarkSettings, load_yaml(config))


def test_neighbouring_queries_are_alike_only_where_they_drift(settings):
    def likeness(inputs):
        query = make_qkv(settings, Heads(4, 2), 1000, inputs).query
        return torch.cosine_similarity(query[:, :, 1:], query[:, :, :-1], dim=-1).mean()

    assert likeness("drifting") > 0.7
    assert likeness("text") > 0.6
    assert abs(likeness("independent")) < 0.1


def test_heads_of_a_group_have_half_in_common_in_text(settings):
    query = make_qkv(settings, Heads(4, 2), 4000, "text").query[0]
    same, other = (torch.cosine_similarity(query[0], query[h], dim=-1).mean() for h in (1, 2))
    assert same > 0.25
    assert abs(other) < 0.1


def test_tiles_of_text_hold_as_many_blocks_as_those_of_a_trained_model(settings):
    S, half = 16384, 8192
    shapes = dataclasses.replace(settings.shapes, head_dim=64)
    attention = InfLLMConfig(topk=56, window_size=512)
    query, key, _ = make_qkv(dataclasses.replace(settings, shapes=shapes), Heads(16, 1), S, "text")
    selected = select_blocks(query[:, :, half:], key, attention)
    for tokens, measured in {2: 1.16, 4: 1.29, 8: 1.42, 16: 1.54, 32: 1.66}.items():
        num, _, _ = union_lists.list_blocks(selected, S, attention.block_size, tokens)
        assert num.float().mean() / 64 == pytest.approx(measured, abs=0.03)


@pytest.mark.parametrize("engine", ["flex", "fused"])
def test_lists_are_built_apart_from_the_attention_over_them(engine, monkeypatch):
    config, qkv = small_config(engine=engine), QKV(*draw_qkv(200, Hq=8))
    selected = select_blocks(*qkv[:2], config)
    steps = engine_steps(qkv, selected, config)
    expected = infllm_attention(*qkv, config, selected=selected)
    steps.build_lists()
    monkeypatch.setattr(union_lists, "list_blocks", None)  # neither step calls the other
    monkeypatch.setattr(infllm_flex_ops, "tile_blocks", None)
    assert torch.equal(steps.attend(), expected)
    with pytest.raises(TypeError, match="not callable"):
        steps.build_lists()


def test_dense_flex_stays_compiled_however_many_shapes_there_are():
    # Uncompiled, it would warn, which is an error here.
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for S in (128, 200, 385):
            qkv = QKV(*draw_qkv(S))
            expected = torch.nn.functional.scaled_dot_product_attention(
                *qkv, is_causal=True, enable_gqa=True
            )
            torch.testing.assert_close(_dense_flex(qkv)(), expected)


def test_everything_runs_by_turns_in_a_rotating_order():
    order = []
    subjects = [Subject(name, "", lambda name=name: order.append(name)) for name in "abc"]
    timings = time_by_turns(subjects, torch.device("cpu"), Limits(1, 3, 100, 0))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [set(parts) for parts in timings] == [{"forward"}] * 3


def test_useful_pairs_are_those_of_the_mask(settings):
    S, config = 205, settings.attention
    selected = select_blocks(*draw_qkv(S)[:2], config)
    seen = attention_mask(selected, config.block_size, S)[0, 0].sum()
    assert visible_pairs(config, S) == seen
    attend = work_of("attend", "forward", settings, Heads(4, 2), S)
    assert attend.flops == 4 * 4 * 16 * seen


def test_the_memory_limit_is_three_times_the_tensors_and_half_a_gibibyte(settings):
    size = 2 * (4 + 2 + 2) * 1024 * 16 * 4 / 2**20
    assert tensors_mib(settings, Heads(4, 2), 1024) == size
    assert limit_mib(settings, Heads(4, 2), 1024) == 3 * size + 512


def test_of_repeated_measurements_the_newest_counts():
    row = dict.fromkeys(COLUMNS, "") | {"op": "infllm_attention", "variant": "auto", "S": "8"}
    ((_, times),) = by_shape([row | {"ms_p50": "2"}, row | {"ms_p50": "3"}]).items()
    assert times == {What("infllm_attention", "auto"): 3.0}


def test_times_of_different_runs_are_not_compared():
    def row(date, op, variant, ms):
        return dict.fromkeys(COLUMNS, "") | {
            "date": date,
            "op": op,
            "variant": variant,
            "S": "8",
            "ms_p50": str(ms),
        }

    rows = [
        row("1", "infllm_attention", "auto", 4),
        row("1", "dense", "sdpa_cudnn", 8),
        row("2", "infllm_attention", "auto", 2),
        row("2", "dense", "sdpa_cudnn", 6),
        row("3", "infllm_attention", "flex", 5),
        row("3", "dense", "sdpa_cudnn", 10),
        row("4", "infllm_attention", "auto", 2),
        row("4", "dense", "sdpa_flash", 30),  # not the fastest
    ]
    assert list(speed_ups(rows).values()) == [{"auto": 3.0, "flex": 2.0}]
    assert list(speed_ups(rows[:2]).values()) == [{"auto": 2.0}]
    assert speed_ups(rows[:1]) == {}


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
