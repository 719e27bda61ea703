"""A folder of MiniCPM 4 loads in one line, without its code, with the results of its code."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.granite.modeling_granite import GraniteRotaryEmbedding

import infllm_flex as ifx
from infllm_flex.minicpm.config import MiniCPMConfig
from tests.minicpm import reference
from tests.minicpm.folders import LONGROPE, SPARSE, config, write
from tests.tolerance import assert_within_rounding

DENSE = {"sparse_config": ...}


def tokens(length, batch=2):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_as_the_architecture(folder, settings, weights, length, **arguments):
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    ids = tokens(length)
    exact = reference.logits(settings, weights, ids)
    plain = reference.logits(settings, weights, ids, model.dtype)
    # The order of operations differs: rotation, scaling and division.
    assert_within_rounding(model(ids).logits, exact, plain, factor=4)


@pytest.mark.parametrize("length", [1, 32, 33, 60])  # 32: the last with the short factors
@pytest.mark.parametrize("max_positions", [32, 64])  # as released; with a factor on attention
def test_both_sides_of_the_longrope_switch(tmp_path, length, max_positions):
    settings = config(max_position_embeddings=max_positions, **DENSE)
    weights = write(tmp_path / "m", settings)
    assert_as_the_architecture(tmp_path / "m", settings, weights, length)


def test_a_model_grows_past_the_switch_and_comes_back(tmp_path):
    settings = config(**DENSE)
    weights = write(tmp_path / "m", settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for length in (20, 50, 20):
        exact = reference.logits(settings, weights, tokens(length))
        with torch.no_grad():
            assert torch.allclose(model(tokens(length)).logits.double(), exact, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": ...},  # tied, as in MiniCPM's own code
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "num_attention_heads": 4, "num_hidden_layers": 1},
        {"rope_scaling": None, "rope_theta": 500.0},
        {"scale_emb": 1, "scale_depth": 1, "dim_model_base": 32},
        {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3},
    ],
    ids=str,
)
def test_other_shapes(tmp_path, changes):
    settings = config(**DENSE, **changes)
    weights = write(tmp_path / "m", settings)
    assert_as_the_architecture(tmp_path / "m", settings, weights, 40)


@pytest.mark.parametrize("files", [1, 3])
def test_bfloat16_and_several_files(tmp_path, files):
    settings = config(torch_dtype="bfloat16", **DENSE)
    weights = write(tmp_path / "m", settings, torch.bfloat16, files)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype is torch.bfloat16
    assert_as_the_architecture(tmp_path / "m", settings, weights, 40)
    assert_as_the_architecture(tmp_path / "m", settings, weights, 40, dtype=torch.float32)


@pytest.mark.parametrize("kind", [{"type": ...}, {"rope_type": ...}, {}])
def test_the_older_key_of_rope_scaling_gives_the_same_model(tmp_path, kind):
    scaling = {"type": "longrope", **LONGROPE, **kind}
    scaling = {name: value for name, value in scaling.items() if value is not ...}
    weights = write(tmp_path / "m", config(rope_scaling=scaling, **DENSE))
    assert_as_the_architecture(tmp_path / "m", config(**DENSE), weights, 50)


def test_it_may_be_scored_by_the_lowest_rotary_frequencies(tmp_path):
    write(tmp_path / "m", config(sparse_config=None))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    every_key = {"kernel_size": 1, "kernel_stride": 1, "pool_queries": True}
    ifx.patch_model(model, {**SPARSE, **every_key, "score_dims": 4})
    assert [row.config.score_dims for row in ifx.describe(model)] == [4] * 3


@torch.no_grad()
def test_its_sparse_config_makes_it_sparse(tmp_path):
    write(tmp_path / "m", config())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert [row.status for row in ifx.describe(model)] == [
        "sparse from 48 tokens on: 3 blocks of 8"
    ] * 3
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "m", sparse_config=None)
    assert not any(row.patched_through for row in ifx.describe(dense))
    short, long = tokens(47), tokens(60)
    dense_short, dense_long = dense(short).logits, dense(long).logits
    assert torch.equal(model(short).logits, dense_short)
    sparse_long = model(long).logits
    assert not torch.allclose(sparse_long, dense_long, atol=1e-2)
    assert torch.equal(sparse_long, ifx.patch_model(dense, SPARSE)(long).logits)
    assert torch.equal(ifx.unpatch_model(model)(long).logits, dense_long)


def test_patching_again_changes_the_settings(tmp_path):
    write(tmp_path / "m", config())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ifx.patch_model(model, topk=4)
    assert "5 blocks of 8" in str(ifx.describe(model))


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_the_code_of_the_folder_never_runs(tmp_path, trust_remote_code):
    write(tmp_path / "m", config())
    arguments = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    settings = AutoConfig.from_pretrained(tmp_path / "m", **arguments)
    assert isinstance(settings, MiniCPMConfig)
    assert settings.mup_denominator == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", **arguments)
    assert model.generate(tokens(5), max_new_tokens=2, do_sample=False).shape == (2, 7)


def test_a_folder_that_names_no_model_type_loads_with_its_configuration(tmp_path):
    write(tmp_path / "m", config(model_type=...))
    settings = MiniCPMConfig.from_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", config=settings)
    assert any(row.sparse for row in ifx.describe(model))


@pytest.mark.parametrize(
    "lines",
    [
        "from transformers import AutoModelForCausalLM; import infllm_flex",
        "import infllm_flex; from transformers import AutoModelForCausalLM",
        "import transformers.modeling_utils, infllm_flex, transformers; "
        "AutoModelForCausalLM = transformers.AutoModelForCausalLM",
    ],
)
def test_any_order_of_imports(tmp_path, lines):
    write(tmp_path / "m", config())
    code = f"{lines}; print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path / 'm')!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        check=True,
        text=True,
        capture_output=True,
    )
    assert "MiniCPMForCausalLM" in done.stdout
    assert "longrope" not in done.stderr  # a warning of transformers that does not apply here
    assert "original_max_position_embeddings" not in done.stderr


def test_a_configuration_travels_to_a_process_that_has_seen_none(tmp_path):
    write(tmp_path / "m", config())
    pickled = pickle.dumps(AutoConfig.from_pretrained(tmp_path / "m"))
    code = (
        "import sys, pickle, transformers; c = pickle.loads(sys.stdin.buffer.read()); "
        "print(type(transformers.AutoModelForCausalLM.from_config(c)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        check=True,
        input=pickled,
        capture_output=True,
    )
    assert b"MiniCPMForCausalLM" in done.stdout


def write_tokenizer(folder, **settings):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>", **settings}))
    (folder / "tokenization_own.py").write_text("raise SystemExit('must not run')\n")


def test_generation_settings_and_tokenizer_of_the_folder(tmp_path):
    folder = tmp_path / "m"
    write(folder, config())
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.8, "eos_token_id": [2, 40]})
    )
    own = {"AutoTokenizer": ["tokenization_own.Tokenizer", None]}
    write_tokenizer(folder, tokenizer_class="PreTrainedTokenizerFast", auto_map=own)
    generation = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (generation.temperature, generation.eos_token_id) == (0.8, [2, 40])
    assert AutoTokenizer.from_pretrained(folder)("a b a").input_ids == [1, 2, 1]


def test_a_tokenizer_of_its_own_class_needs_its_code_or_another_class(tmp_path):
    folder = tmp_path / "m"
    write(folder, config())
    own = {"AutoTokenizer": ["tokenization_own.Tokenizer", None]}
    write_tokenizer(folder, tokenizer_class="Tokenizer", auto_map=own)
    with pytest.raises(ValueError, match="custom code"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert PreTrainedTokenizerFast.from_pretrained(folder)("a b a").input_ids == [1, 2, 1]
    assert any(row.sparse for row in ifx.describe(AutoModelForCausalLM.from_pretrained(folder)))


def test_longer_positions_are_asked_for_when_loading(tmp_path):
    settings = config(max_position_embeddings=128, **DENSE)
    weights = write(tmp_path / "m", config(**DENSE))
    assert_as_the_architecture(tmp_path / "m", settings, weights, 60, max_position_embeddings=128)
    scaling = {**LONGROPE, "long_factor": [2.0] * 4}
    assert_as_the_architecture(
        tmp_path / "m",
        config(rope_scaling=scaling, **DENSE),
        weights,
        60,
        rope_scaling={"type": "longrope", **{n: v for n, v in scaling.items() if n != "rope_type"}},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_rotary_embedding_has_the_bits_of_that_of_transformers(tmp_path, dtype):
    write(tmp_path / "m", config())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    theirs = GraniteRotaryEmbedding(config=model.config)
    x = torch.empty(0, dtype=dtype)
    for length in (32, 33, 7):
        positions = torch.arange(length)[None]
        for ours, expected in zip(
            model.model.rotary_emb(x, positions), theirs(x, positions), strict=True
        ):
            assert ours.dtype is dtype
            assert torch.equal(ours, expected)


def test_one_graph_on_both_sides_of_both_switches(tmp_path):
    write(tmp_path / "m", config())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for length in (20, 40, 60):
            expected, found = model(tokens(length)).logits, compiled(tokens(length)).logits
            assert torch.allclose(found, expected, atol=1e-4)
