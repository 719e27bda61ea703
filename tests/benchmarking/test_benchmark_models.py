"""The command that times whole models: its rows, its words, and how it continues."""

from __future__ import annotations

import pytest
import torch

from benchmarking.whole_models import checks, clock, measurements
from benchmarking.whole_models.rows import COLUMNS, reason_for
from benchmarking.whole_models.settings import ModelBenchmark
from benchmarking.whole_models.tables import layers_of, tables
from infllm_flex.patch import UnsupportedModelError
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from tests.benchmarking.command import ROOT, rows_of

pytest.importorskip("transformers")

CONFIG = """\
run: {out: OUT, device: cpu, dtype: float32, rounds: 2, steps: 2, compile_backend: eager}
models:
  llama: {family: llama, num_layers: 2, hidden_size: 64, intermediate_size: 64, num_heads: 4,
          num_kv_heads: 2, vocab_size: 64, attention: ATTENTION}
  qwen3: {family: qwen3, num_layers: 1, hidden_size: 64, intermediate_size: 64, num_heads: 2,
          num_kv_heads: 2, vocab_size: 64, attention: ATTENTION}
  minicpm: {family: minicpm, num_layers: 1, hidden_size: 64, intermediate_size: 64, num_heads: 4,
            num_kv_heads: 1, vocab_size: 64, attention: ATTENTION}
cases:
  overlap: {phase: overlap, models: [llama], lengths: [256], activations: [text, random]}
  prefill: {phase: prefill, lengths: [160], activations: [text], profile: true}
  decode: {phase: decode, models: [minicpm], lengths: [160], batch: 2}
  static: {phase: decode_static, models: [qwen3], lengths: [160]}
  train: {phase: train, models: [llama], lengths: [160], layers: 1, activations: [text]}
"""
ATTENTION = (
    "{kernel_size: 8, kernel_stride: 4, block_size: 16, window_size: 32, topk: 3, dense_len: 128,"
    " engine: fused}"
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "models.yaml"
    text = CONFIG.replace("OUT", str(tmp_path / "out.csv")).replace("ATTENTION", ATTENTION)
    path.write_text(text)
    return path


@pytest.mark.slow
def test_every_phase_is_measured_dense_and_patched(run_script, config, tmp_path):
    status, out, err = run_script("benchmark_models", "--config", config)
    assert status == 0, err
    rows = rows_of(tmp_path / "out.csv")
    assert tuple(rows[0]) == COLUMNS
    assert {row["result"] for row in rows} == {"measured"}
    timed = [row for row in rows if row["phase"] != "overlap"]
    assert [(row["phase"], row["model"], row["layers"], row["B"]) for row in timed[::2]] == [
        ("prefill", "llama", "2", "1"),
        ("train", "llama", "1", "1"),
        ("prefill", "qwen3", "1", "1"),
        ("decode_static", "qwen3", "1", "1"),
        ("prefill", "minicpm", "1", "1"),
        ("decode", "minicpm", "1", "2"),
    ]
    assert [row["attention"] for row in timed] == ["dense", "sparse"] * 6
    for row in timed:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert row["torch"] == torch.__version__
        assert row["commit"]
        selects = row["phase"] == "prefill" and row["attention"] == "sparse"
        assert selects == (float(row["ms_selection"] or 0) > 0)
    ratios = {row["tile_tokens"]: float(row["inflation"]) for row in rows if row["tile_tokens"]}
    assert list(ratios) == ["2", "4", "8", "16", "32"]
    assert "1 of 2" in out
    assert f"{len(rows)} rows added" in out


def test_a_second_run_measures_only_what_is_missing(run_script, config, tmp_path):
    once = ("benchmark_models", "--config", config, "--cases", "prefill,decode")
    assert run_script(*once, "cases.prefill.models=[minicpm]", "run.rounds=1")[0] == 0
    before = (tmp_path / "out.csv").read_text()
    status, out, _ = run_script(*once, "cases.prefill.models=[minicpm, qwen3]", "run.rounds=1")
    assert status == 0
    after = (tmp_path / "out.csv").read_text()
    assert after.startswith(before)
    assert "2 measurements are in" in out
    assert [row["model"] for row in rows_of(tmp_path / "out.csv")[4:]] == ["qwen3", "qwen3"]


def test_the_end_of_the_time_keeps_what_is_measured(run_script, config, tmp_path, monkeypatch):
    real, calls = measurements.time_by_turns, []

    def second_is_too_late(*args):
        calls.append(1)
        if len(calls) == 2:
            raise clock.OutOfTimeError
        return real(*args)

    monkeypatch.setattr(measurements, "time_by_turns", second_is_too_late)
    once = ("benchmark_models", "--config", config, "--cases", "prefill", "--max-seconds", "500")
    status, out, err = run_script(*once)
    assert status == 0, err
    assert "out of time, 2 measurements are left" in out
    assert [row["model"] for row in rows_of(tmp_path / "out.csv")] == ["llama"] * 2


def test_nothing_runs_after_the_deadline(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    deadline = clock.Deadline(5)
    deadline.check()
    now[0] = 105.0
    with pytest.raises(clock.OutOfTimeError):
        deadline.check()
    clock.Deadline(0).check()


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (UnsupportedModelError("sliding\nwindow"), "not supported: sliding window"),
        (RuntimeError("cuDNN failed"), "failed: cuDNN failed"),
        (RuntimeError(), "failed: RuntimeError"),
    ],
)
def test_a_failure_is_a_word_in_its_cell(run_script, config, tmp_path, monkeypatch, error, word):
    def fail(*args):
        raise error

    monkeypatch.setattr(measurements, "time_by_turns", fail)
    once = ("benchmark_models", "--config", config, "--cases", "decode")
    status, out, err = run_script(*once)
    assert status == 0
    assert word in err
    assert [row["result"] for row in rows_of(tmp_path / "out.csv")] == [word] * 2
    assert {row["ms_p50"] for row in rows_of(tmp_path / "out.csv")} == {""}
    assert out.count(f"  {word.partition(':')[0]}") == 2
    assert "1 measurements are in" in run_script(*once)[1]  # it would fail again


def test_wrong_attention_is_never_timed(run_script, config, tmp_path, monkeypatch):
    def check(*args):
        raise checks.IncorrectError("error 3, allowed 1")

    monkeypatch.setattr(checks, "check_operators", check)
    status, _, err = run_script("benchmark_models", "--config", config, "--cases", "decode,train")
    assert status == 1
    assert "error 3, allowed 1" in err
    results = {row["result"] for row in rows_of(tmp_path / "out.csv")}
    assert results == {"wrong: error 3, allowed 1"}


@pytest.mark.parametrize("phase", ["prompt", "decode"])
def test_a_wrong_way_into_the_model_is_found(run_script, config, tmp_path, monkeypatch, phase):
    import infllm_flex.patch.huggingface.attention as module

    name = "infllm_attention" if phase == "prompt" else "attend_cached"
    original = getattr(module, name, None)
    if original is None:
        pytest.fail(f"{module.__name__} has no {name}; name the function that attends there now")
    monkeypatch.setattr(module, name, lambda *args, **kwargs: original(*args, **kwargs) * 1.01)
    status, _, err = run_script("benchmark_models", "--config", config, "--cases", "decode")
    assert status == 1
    assert "with every block selected: attention layer 0 differs from dense" in err


def test_models_that_prefer_other_tokens_are_compared_by_the_same_token(
    run_script, config, monkeypatch
):
    """Rounding decides between tokens that are equally likely."""
    original = checks._check_model

    def prefer_another_token(model, inputs, out):
        out.logits.neg_()

    def check(run, pair, attention):
        hook = pair.sparse.register_forward_hook(prefer_another_token)
        try:
            original(run, pair, attention)
        finally:
            hook.remove()

    monkeypatch.setattr(checks, "_check_model", check)
    status, _, err = run_script("benchmark_models", "--config", config, "--cases", "decode")
    assert status == 0, err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run.rouns=3", "run.rouns: unknown key (did you mean rounds?)"),
        ("cases.decode.models=[gpt]", "cases.decode.models"),
        ("cases.train.layers=3", "cases.train.layers must be at most the 2 layers of llama"),
        ("cases.prefill.activations=[trained]", "trained is for phase: overlap"),
        ("cases.prefill.activations=[text, text]", "none twice"),
        ("models.llama.num_kv_heads=3", "num_heads: must be a multiple of num_kv_heads"),
        ("--cases=prefil", "--cases must be names of cases, overlap, prefill"),
        ("run.out=x.txt", "run.out: must name a .csv file"),
    ],
)
def test_a_bad_setting_is_one_line_and_status_2(run_script, config, argument, message):
    status, _, err = run_script("benchmark_models", "--config", config, argument)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_csv_of_something_else_is_left_alone(run_script, config, tmp_path):
    (tmp_path / "out.csv").write_text("a,b\n1,2\n")
    assert run_script("benchmark_models", "--config", config)[0] == 2
    assert (tmp_path / "out.csv").read_text() == "a,b\n1,2\n"


def test_the_config_is_complete_and_every_phase_has_a_case():
    path = ROOT / "configs" / "bench_models.yaml"
    settings = build_dataclass(ModelBenchmark, load_yaml(path))
    phases = {case.phase for case in settings.cases.values()}
    assert phases == {"overlap", "prefill", "decode", "decode_static", "train"}
    assert {"text", "random"} <= set(settings.cases["prefill"].activations)
    assert {case.batch for case in settings.cases.values()} == {1, 16}


def test_a_table_says_which_part_of_a_model_was_built():
    assert layers_of("8", 32) == "8 of 32"
    assert layers_of("32", 32) == "32"
    assert tables([], {}) == {}


def test_reason_for_names_errors_without_text():
    assert reason_for(NotImplementedError()) == "not supported: NotImplementedError"
