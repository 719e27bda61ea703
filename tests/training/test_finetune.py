"""The exit status of the command; nothing is loaded before everything is checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from infllm_flex.strict_yaml import build_dataclass, load_yaml
from infllm_flex.training.data import WindowSampler
from infllm_flex.training.settings import TrainingSettings
from tests.checkout import ROOT, environment
from tests.training.runs import settings

SCRIPT = ROOT / "scripts" / "finetune.py"


@pytest.fixture
def config(tmp_path, texts):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""\
run: {{folder: {tmp_path / "out"}, device: cpu}}
model:
  tiny: {{num_layers: 1, hidden_size: 16, intermediate_size: 16, num_heads: 2, num_kv_heads: 1}}
data: {{source: {texts}}}
stages:
  only: {{attention: dense, max_length: 16, batch_size: 2, steps: 3, learning_rate: 2e-3,
    decay_steps: 1}}
"""
    )
    return path


def test_a_run_ends_with_status_0_and_prints_the_folder_of_the_model(finetune, config, tmp_path):
    status, out, err = finetune("--config", config)
    assert status == 0
    assert f"3 of 3 steps done; model in {tmp_path / 'out' / 'model'}" in out
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert "bits/byte" in err
    assert "tokens/s" in err
    assert "100%" in err


def test_all_mistakes_end_the_command_with_status_2_before_anything_is_loaded(config, tmp_path):
    text = config.read_text().replace("learning_rate: 2e-3", "lerning_rate: 2e-3, warmup_steps: x")
    config.write_text(text + "optim: {kind: adam}\n")
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['finetune.py', '--config', {str(config)!r}, 'log.every=0']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'transformers' in sys.modules)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=True,
    )
    assert ended.stdout == "2 False\n"
    said = ended.stderr.replace(f"{config}:", "run.yaml:").splitlines()
    assert said == [
        "run.yaml:6: stages.only.lerning_rate: unknown key (did you mean learning_rate?)",
        "run.yaml:6: stages.only.warmup_steps: expected an integer, got x",
        "run.yaml:6: stages.only.learning_rate: is missing and has no default",
        "run.yaml:8: optim.kind: expected one of adamw, muon, adamw8bit, got adam",
        "override 'log.every=0': log.every: must be between 1 and 2147483647, got 0",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "", "- a\n", "run: [\n"])
def test_a_missing_or_malformed_config_ends_the_command_with_status_2(finetune, tmp_path, content):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    status, out, err = finetune("--config", path)
    assert status == 2
    assert out == ""
    assert err.startswith(f"{path}")
    assert err.count("\n") == 1


def test_a_folder_that_holds_a_run_ends_the_command_with_status_2(finetune, config):
    assert finetune("--config", config)[0] == 0
    status, _, err = finetune("--config", config)
    assert status == 2
    assert "already holds a run: add --resume" in err
    assert finetune("--config", config, "--resume")[0] == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_gives_its_own_status(
    finetune, config, tmp_path, monkeypatch, number, status
):
    real = WindowSampler.batch

    def batch(self, indices):
        os.kill(os.getpid(), number)
        return real(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(WindowSampler, "batch", batch)
        assert finetune("--config", config)[0] == status
    assert (tmp_path / "out" / "checkpoints" / "step-00000001" / "MANIFEST.json").is_file()
    assert finetune("--config", config, "--resume")[0] == 0


def test_a_failure_during_the_run_is_one_line_with_status_1(finetune, config):
    status, _, err = finetune("--config", config, "stages.only.max_length=100000")
    assert status == 1
    assert "error: data.source: " in err
    assert "too few for sequences of 100000" in err
    assert "Traceback" not in err


def test_print_config_prints_settings_that_read_back_equal(finetune, config, tmp_path):
    status, out, _ = finetune("--config", config, "optim.weight_decay=2e-5", "--print-config")
    assert status == 0
    (tmp_path / "shown.yaml").write_text(out)
    shown = build_dataclass(TrainingSettings, load_yaml(tmp_path / "shown.yaml"))
    given = load_yaml(config, ["optim.weight_decay=2e-5"])
    assert shown == build_dataclass(TrainingSettings, given)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_checks_everything_and_writes_nothing(finetune, tmp_path):
    path = ROOT / "configs" / "tiny_bytes.yaml"
    status, out, err = finetune("--config", path, f"run.folder={tmp_path / 'out'}", "--dry-run")
    assert (status, err) == (0, "")
    assert "sparse (a query attends to at most 448 tokens, 22%)" in out
    assert "model: LlamaForCausalLM, 0.000" in out
    assert "GiB on each device: weights 0.0" in out
    assert "long: first batch of a process 2 x 2048 tokens in 2 documents, 100% of them sp" in out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_can_assume_many_processes(finetune, config):
    shared = ("--dry-run", "stages.only.batch_size=12", "parallel.context=2")
    status, out, _ = finetune("--config", config, *shared, "--processes", "8")
    assert status == 0
    assert "first batch of a process 3 x 16 tokens" in out
    status, _, err = finetune("--config", config, *shared, "--processes", "10")
    assert status == 1
    assert "batch_size must be a multiple of 5, the number of processes divided by" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "8"], "--processes needs --dry-run"),
        (["--processes", "0", "--dry-run"], "--processes must be at least 1, got 0"),
    ],
)
def test_a_number_of_processes_without_effect_is_refused(
    finetune, config, capsys, options, message
):
    with pytest.raises(SystemExit, match="2"):
        finetune("--config", config, *options)
    assert message in capsys.readouterr().err


def test_processes_that_torchrun_did_not_start_are_refused(finetune, config, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = finetune("--config", config)
    assert status == 1
    assert "2 processes (WORLD_SIZE) must be started by torchrun, this one was not" in err
    assert not (tmp_path / "out").exists()


def test_a_resumed_folder_without_a_step_is_a_warning(finetune, config, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = finetune("--config", config, "--resume")
    assert status == 0
    assert f"warning: {tmp_path / 'out'} holds no step to resume: the run begins anew" in err
    assert "warning" not in finetune("--config", config, "--resume")[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.only.max_length=100000"], "too few for sequences of 100000"),
        (["parallel.context=2"], "parallel.context must divide the number of processes, 1, got 2"),
        (
            ["model.tiny=null", "model.path={gpt2}"],
            "GPT2LMHeadModel has no list of decoder layers",
        ),
        (
            ["model.tiny=null", "model.path={windowed}"],
            "cannot be patched: found 1 attention layers, none of which can be sparse",
        ),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_an_impossible_run_is_refused_in_one_line_before_any_work(
    finetune, config, models, tmp_path, overrides, message, dry
):
    overrides = [text.format(**models) for text in overrides]
    few_blocks = "{kernel_size: 2, kernel_stride: 1, block_size: 2, window_size: 2, topk: 2}"
    sparse = ["stages.only.attention=sparse", "stages.only.rope_theta=9"]
    sparse += [f"attention={few_blocks}", "attention.dense_len=-1"]
    arguments = ["--dry-run"] * dry + sparse + overrides
    status, _, err = finetune("--config", config, *arguments)
    assert status == 1
    assert message in err
    assert [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    assert not list(tmp_path.glob("out/checkpoints/*"))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models that do not fit some setting."""
    size = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    found = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=256)),
        "windowed": MistralForCausalLM(MistralConfig(**size, **heads)),
    }
    for name, model in found.items():
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        found[name] = folder
    return found


def test_a_stage_without_a_schedule_is_a_warning(finetune, config):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = finetune("--config", config, "--dry-run", "stages.only.decay_steps=0")
    assert status == 0
    assert err.count("\n") == 1
    assert "warning: stages.only: the learning rate is constant, 0.002" in err


def test_the_settings_in_a_run_folder_are_complete(tmp_path, texts):
    from infllm_flex.training.loop import train

    run = settings(tmp_path / "run", texts)
    train(run, show=False)
    kept = load_yaml(tmp_path / "run" / "run.yaml")
    assert build_dataclass(TrainingSettings, kept) == run
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


@pytest.mark.parametrize(
    ("overrides", "is_warned"),
    [
        (["attention.topk=8"], True),
        (["attention.topk=8", "attention.kernel_size=32"], False),
        (
            ["attention.pool_queries=true", "attention.kernel_size=1", "attention.kernel_stride=1"],
            False,
        ),
        (["stages.long.attention=dense"], False),
        (["model.hub=null", "model.tiny.num_layers=1"], False),  # it is not trained yet
    ],
)
def test_a_pretrained_model_scored_by_default_is_warned_about(
    finetune, tmp_path, overrides, is_warned
):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run: {{folder: {tmp_path / 'run'}}}\n"
        "model: {hub: some/model}\n"
        "data: {source: python_stdlib}\n"
        "stages: {long: {max_length: 65536, batch_size: 1, steps: 1, learning_rate: 1e-4}}\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = finetune("--config", config, "--print-config", *overrides)
    assert status == 0, err
    assert ("means of 32 keys are" in err) == is_warned
