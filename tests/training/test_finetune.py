"""The command: its exit status, and that nothing is loaded before everything is checked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from infllm_flex.strict_yaml import build_dataclass, load_yaml
from infllm_flex.training.data import WindowSampler
from infllm_flex.training.settings import TrainingSettings
from tests.checkout import ROOT, environment
from tests.training.runs import settings, write_lines

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


@pytest.fixture
def finetune(monkeypatch, capsys):
    """Run the command in this process: its status, standard output and standard error."""
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.showwarning", None)  # the command sets its own
            status = module.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_run_ends_with_status_0_and_says_where_the_model_is(finetune, config, tmp_path):
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
def test_a_config_that_is_none_ends_the_command_with_status_2(finetune, tmp_path, content):
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
def test_a_signal_saves_and_its_status_says_so(
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


def test_a_failure_on_the_way_is_one_line_with_status_1(finetune, config):
    status, _, err = finetune("--config", config, "stages.only.max_length=100000")
    assert status == 1
    assert "error: data.source: " in err
    assert "too few for sequences of 100000" in err
    assert "Traceback" not in err


def test_print_config_shows_settings_that_read_back_the_same(finetune, config, tmp_path):
    status, out, _ = finetune("--config", config, "optim.weight_decay=2e-5", "--print-config")
    assert status == 0
    (tmp_path / "shown.yaml").write_text(out)
    shown = build_dataclass(TrainingSettings, load_yaml(tmp_path / "shown.yaml"))
    given = load_yaml(config, ["optim.weight_decay=2e-5"])
    assert shown == build_dataclass(TrainingSettings, given)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_checks_everything_and_does_nothing(finetune, tmp_path):
    path = ROOT / "configs" / "tiny_bytes.yaml"
    status, out, err = finetune("--config", path, f"run.folder={tmp_path / 'out'}", "--dry-run")
    assert (status, err) == (0, "")
    assert "sparse (a query attends to at most 448 tokens, 22%)" in out
    assert "model: LlamaForCausalLM, 0.000" in out
    assert "GiB on each device: weights 0.0" in out
    assert "long: first batch of a process 2 x 2048 tokens in 2 documents, 100% of them sp" in out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_can_stand_for_many_processes(finetune, config):
    shared = ("--dry-run", "stages.only.batch_size=12", "parallel.context=2")
    status, out, _ = finetune("--config", config, *shared, "--processes", "8")
    assert status == 0
    assert "first batch of a process 3 x 16 tokens" in out
    status, _, err = finetune("--config", config, *shared, "--processes", "10")
    assert status == 1
    assert "batch_size must be a multiple of 5, the number of processes divided by" in err


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
def test_what_cannot_work_is_one_line_before_any_work(
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
    """Folders of models that some setting does not fit."""
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


def test_a_stage_without_a_schedule_is_warned_of(finetune, config):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = finetune("--config", config, "--dry-run", "stages.only.decay_steps=0")
    assert status == 0
    assert err.count("\n") == 1
    assert "warning: stages.only: the learning rate is constant, 0.002" in err


@pytest.mark.parametrize("name", ["quickstart", "tiny_bytes"])
def test_the_tiny_recipes_really_are_sparse_long_and_within_their_budget(name):
    run = build_dataclass(TrainingSettings, load_yaml(ROOT / "configs" / f"{name}.yaml"))
    short, long = run.stages["short"], run.stages["long"]
    assert (short.attention, long.attention) == ("dense", "sparse")
    assert long.max_length >= 8 * short.max_length
    assert not run.attention.is_dense(long.max_length)
    assert run.attention.num_selected * run.attention.block_size < long.max_length / 4


def test_every_config_starts_with_the_command_that_uses_it():
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        header = path.read_text().partition("\n\n")[0]
        assert header.startswith("#"), path
        assert f"configs/{path.name}" in header, path


def test_the_settings_kept_in_a_run_folder_are_complete(tmp_path, texts):
    from infllm_flex.training.loop import train

    run = settings(tmp_path / "run", texts)
    train(run, show=False)
    kept = load_yaml(tmp_path / "run" / "run.yaml")
    assert build_dataclass(TrainingSettings, kept) == run
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


# What the models' own config.json say of their sizes.
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_QWEN3 = {
    **_LLAMA3,
    "model_type": "qwen3",
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
_MINICPM4 = {
    **_LLAMA3,
    "model_type": "minicpm",
    "vocab_size": 73448,
    "intermediate_size": 16384,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
}
LARGE = {
    "minicpm4_8b_32k": (_MINICPM4, 32768, 8.19),
    "llama3_8b_64k": (_LLAMA3, 65536, 8.03),
    "qwen3_8b_128k": (_QWEN3, 131072, 8.19),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_config_passes_its_dry_run_and_its_comment_says_what_that_estimates(
    finetune, tmp_path, monkeypatch, name
):
    gpu = torch.device("cuda")  # on a CPU the program itself would be added
    monkeypatch.setattr("infllm_flex.training.preflight.pick_device", lambda device: gpu)
    description, length, billions = LARGE[name]
    folder, texts = tmp_path / "model", tmp_path / "texts"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(description))
    (folder / "model.safetensors").write_bytes(b"")  # its weights are not read
    texts.mkdir()
    documents = [size for size in (3000, 9000, 20_000, 30_000, 60_000, 130_000) for _ in range(20)]
    write_lines(texts / "a.jsonl", [f"{n} " * (size // 5) for n, size in enumerate(documents)])
    config = ROOT / "configs" / f"{name}.yaml"
    overrides = [
        f"run.folder={tmp_path / 'run'}",
        "model.hub=null",
        f"model.path={folder}",
        f"data.source={texts}",
        "data.tokenizer=bytes",  # the folder has none
        f"data.cache={tmp_path / 'tokens'}",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, out, err = finetune("--config", config, "--dry-run", "--processes=8", *overrides)
    assert status == 0
    assert err.count("warning: ") == 1
    assert "data.tokenizer: bytes are not the" in err
    assert f"{billions} billion weights" in out
    assert f"long: first batch of a process 1 x {length} tokens" in out
    (estimate,) = re.findall(r"memory, estimated: (.*)", out)
    assert re.search(r"not measured: (.*)", config.read_text())[1] == estimate
    assert float(estimate.split()[0]) < 72  # of 80 GB, which are 74.5 GiB


def test_a_large_config_without_its_model_or_text_says_what_is_missing(finetune, tmp_path):
    config = ROOT / "configs" / "qwen3_8b_128k.yaml"
    status, _, err = finetune("--config", config, f"run.folder={tmp_path / 'run'}", "--dry-run")
    assert status == 2
    assert err.endswith(
        "data.source: must be python_stdlib or a local folder or file, got 'data/long'\n"
    )
