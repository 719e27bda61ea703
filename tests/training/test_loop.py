"""A run follows its settings; a stopped and resumed run ends in the same bits."""

from __future__ import annotations

import json
import math
import signal
import warnings
from dataclasses import replace

import pytest
import torch

import infllm_flex as ifx
from infllm_flex.training import loss
from infllm_flex.training.checkpoints import newest
from infllm_flex.training.data import PackedSampler, WindowSampler
from infllm_flex.training.loop import TrainingDivergedError, train
from infllm_flex.training.model import load_model
from infllm_flex.training.settings import (
    CheckpointSettings,
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
)
from tests.tiny_model import write_tiny_model
from tests.training.runs import (
    ATTENTION,
    LONG,
    TINY,
    interrupted,
    metrics,
    settings,
    stage,
    weights_hash,
    write_lines,
)


def losses(run):
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in metrics(run)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_resumed_after_any_step_ends_in_the_same_bits(tmp_path, texts, kind):
    optim = OptimSettings(kind=kind)
    straight = settings(tmp_path / "straight", texts, optim=optim)
    expected = train(straight, show=False)
    assert (expected.step, expected.signal) == (6, 0)
    for stopped_after in range(1, 6):
        run = settings(tmp_path / str(stopped_after), texts, optim=optim)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WindowSampler, "batch", interrupted(WindowSampler.batch, stopped_after))
            stopped = train(run, show=False)
        assert (stopped.step, stopped.signal) == (stopped_after, signal.SIGINT)
        torch.rand(7)  # another process would stand elsewhere in the random numbers
        resumed = train(run, resume=True, show=False)
        assert weights_hash(resumed.model) == weights_hash(expected.model)
        assert losses(run) == losses(straight)


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps_exactly(
    tmp_path, texts, monkeypatch
):
    straight = settings(tmp_path / "straight", texts, checkpoint=CheckpointSettings(every=2))
    expected = train(straight, show=False)
    run = replace(straight, run=replace(straight.run, folder=tmp_path / "killed"))
    with monkeypatch.context() as patch:
        real, calls = WindowSampler.batch, iter(range(1, 100))

        def batch(self, indices):
            if next(calls) == 6:
                raise KeyboardInterrupt  # as from nowhere: nothing is saved
            return real(self, indices)

        patch.setattr(WindowSampler, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            train(run, show=False)
    assert newest(run.run.folder / "checkpoints").name == "step-00000004"
    resumed = train(run, resume=True, show=False)
    assert weights_hash(resumed.model) == weights_hash(expected.model)
    assert losses(run) == losses(straight)


def test_a_finished_run_resumed_changes_nothing(tmp_path, texts):
    run = settings(tmp_path / "run", texts)
    first = train(run, show=False)
    before = weights_hash(first.model)
    assert train(run, resume=True, show=False) == first
    assert weights_hash(first.model) == before
    assert len(metrics(run)) == 6


def test_the_loss_falls_and_the_checkpoint_is_a_model_folder(tmp_path, texts):
    run = settings(
        tmp_path / "run", texts, stages={"only": stage(steps=40, batch_size=4, warmup_steps=3)}
    )
    outcome = train(run, show=False)
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert set(lines[0]) == {
        "step",
        "stage",
        "loss",
        "bits_per_byte",
        "gradient_norm",
        "learning_rate",
        "tokens_per_second",
        "sparse_layers",
        "sparse_tokens",
        "mfu",
        "memory_gib",
    }
    model = load_model(outcome.model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    second = settings(
        tmp_path / "next",
        texts,
        model=ModelSettings(path=outcome.model),
        stages={"only": stage(steps=1)},
    )
    train(second, show=False)
    assert metrics(second)[0]["loss"] < lines[0]["loss"] - 1


def test_bits_are_named_by_what_a_token_is(tmp_path, capfd):
    folder = write_tiny_model(tmp_path / "model")
    lines = write_lines(tmp_path / "a.jsonl", ["one text, two texts " * 20] * 4)
    data = DataSettings(source=str(lines), packing="documents", held_out_percent=0)
    model = ModelSettings(path=folder)
    for tokenizer, unit in (("model", "token"), ("bytes", "byte"), (str(folder), "token")):
        run = settings(
            tmp_path / f"run-{unit}-{len(tokenizer)}",
            tmp_path,
            model=model,
            data=replace(data, tokenizer=tokenizer),
            stages={"only": stage(steps=1)},
        )
        train(run)
        (line,) = metrics(run)
        assert [name for name in line if name.startswith("bits")] == [f"bits_per_{unit}"]
        assert line[f"bits_per_{unit}"] == pytest.approx(line["loss"] / math.log(2))
        assert f"bits/{unit}" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path, texts, monkeypatch
):
    run = settings(tmp_path / "run", texts, checkpoint=CheckpointSettings(every=2))
    real, calls = loss.F.cross_entropy, iter(range(1, 100))

    def cross_entropy(*args, **kwargs):
        return real(*args, **kwargs) * (float("nan") if next(calls) == 4 else 1.0)

    monkeypatch.setattr(loss.F, "cross_entropy", cross_entropy)
    expected = r"step 4: the loss is nan; its batch is samples 0 to 1 of stage long; .* of step 2;"
    with pytest.raises(TrainingDivergedError, match=expected):
        train(run, show=False)
    assert newest(run.run.folder / "checkpoints").name == "step-00000002"


@pytest.mark.parametrize(
    ("attention", "length", "warning"),
    [
        (ATTENTION, 63, "attention will be dense: max_length = 63 is below attention.dense_len"),
        (replace(ATTENTION, topk=9), 80, "every block will be selected: the budget of 10 blocks"),
    ],
)
def test_a_sparse_stage_that_would_be_dense_is_a_warning(
    tmp_path, texts, attention, length, warning
):
    run = settings(
        tmp_path / "run",
        texts,
        attention=attention,
        stages={"long": stage(attention="sparse", max_length=length, steps=1)},
    )
    with pytest.warns(UserWarning, match=warning):
        train(run, show=False)


def test_a_sparse_stage_is_sparse_in_every_layer_and_unpatches_the_model(tmp_path, texts):
    short = stage(steps=1)
    stages = {"short": short, "long": replace(LONG, attention="sparse", max_length=128)}
    run = settings(tmp_path / "sparse", texts, stages=stages)
    outcome = train(run, show=False)
    assert [line["sparse_layers"] for line in metrics(run)] == [0.0, 1.0, 1.0, 1.0]
    dense = settings(
        tmp_path / "dense", texts, stages={"short": short, "long": replace(LONG, max_length=128)}
    )
    train(dense, show=False)
    assert losses(dense)[0] == losses(run)[0]
    assert losses(dense)[1:] != losses(run)[1:]
    config = json.loads((outcome.checkpoint / "config.json").read_text())
    assert config["sparse_config"] == ATTENTION.to_sparse_config()
    assert "engine" not in config["sparse_config"]
    assert "attn_implementation" not in str(config)


def test_a_stage_by_position_trains_what_chunks_compute(tmp_path, texts):
    only = stage(attention="sparse", max_length=128)
    attention = replace(ATTENTION, dense_by="position")  # dense up to 63 tokens
    run = settings(tmp_path / "run", texts, stages={"only": only}, attention=attention)
    outcome = train(run, show=False)
    assert {line["sparse_tokens"] for line in metrics(run)} == {65 / 128}
    model = ifx.patch_model(load_model(outcome.model))
    assert {row.config.dense_by for row in ifx.describe(model)} == {"position"}
    tokens = torch.arange(128)[None] * 7 % 256
    with torch.no_grad():
        whole, part = model(tokens).logits, model(tokens[:, :100]).logits
    torch.testing.assert_close(part, whole[:, :100], rtol=1e-4, atol=1e-5)
    by_sequence = replace(run, attention=ATTENTION, run=replace(run.run, folder=tmp_path / "other"))
    train(by_sequence, show=False)
    assert losses(by_sequence) != losses(run)


def test_a_stage_longer_than_the_model_needs_another_rope_theta(tmp_path, texts):
    outcome = train(settings(tmp_path / "run", texts, stages={"a": stage(steps=1)}), show=False)
    longer = settings(
        tmp_path / "next",
        texts,
        model=ModelSettings(path=outcome.model),
        stages={"long": stage(max_length=33)},
    )
    with pytest.raises(
        ValueError, match=r"stages\.long: .* positions for 32 tokens, .* asks for 33"
    ):
        train(longer, show=False)
    stages = {"long": stage(max_length=33, rope_theta=5e5, steps=1), "on": stage(max_length=33)}
    further = replace(longer, run=RunSettings(folder=tmp_path / "far"), stages=stages)
    config = load_model(train(further, show=False).model).config
    assert config.max_position_embeddings == 33
    assert config.rope_parameters["rope_theta"] == 5e5


def test_a_missing_gpu_is_refused(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = settings(tmp_path / "run", texts, run=RunSettings(folder=tmp_path / "r", device="cuda"))
    with pytest.raises(ValueError, match="cuda is not available here"):
        train(run, show=False)


@pytest.mark.slow  # torchao compiles its step
def test_a_run_with_8_bit_state_resumes_in_the_same_bits(tmp_path, texts, stop_at):
    model = ModelSettings(tiny=replace(TINY, hidden_size=128))  # large enough for 8-bit state
    optim = OptimSettings(kind="adamw8bit")
    straight = settings(tmp_path / "straight", texts, model=model, optim=optim)
    run = settings(tmp_path / "run", texts, model=model, optim=optim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about torchao
        expected = train(straight, show=False)
        stop_at(2)
        assert train(run, show=False).step == 2
        resumed = train(run, resume=True, show=False)
    assert weights_hash(resumed.model) == weights_hash(expected.model)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # as in test_loader
def test_packed_documents_train_and_resume_in_the_same_bits(tmp_path, monkeypatch):
    # The same rows hold sparse documents of the longest class and dense ones of the shortest.
    texts = [f"{i} is a number. " * (i % 7 + 1) for i in range(90)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    data = DataSettings(source=str(path), packing="documents", held_out_percent=0)
    only = stage(steps=20, batch_size=4, max_length=128, length_buckets=(32, 64))
    stages = {"only": replace(only, attention="sparse")}
    straight = settings(tmp_path / "straight", tmp_path, data=data, stages=stages)
    expected = train(straight, show=False)
    assert metrics(straight)[-1]["loss"] < metrics(straight)[0]["loss"]
    assert all(0 < line["sparse_tokens"] < 1 for line in metrics(straight))
    run = settings(tmp_path / "run", tmp_path, data=data, stages=stages)
    with monkeypatch.context() as patch:
        patch.setattr(PackedSampler, "batch", interrupted(PackedSampler.batch, 7))
        assert train(run, show=False).step == 7
    # With other workers, and a token store in another folder.
    moved = replace(run, data=replace(data, workers=1, cache=tmp_path / "cache"))
    resumed = train(moved, resume=True, show=False)
    assert weights_hash(resumed.model) == weights_hash(expected.model)
    assert losses(run) == losses(straight)
