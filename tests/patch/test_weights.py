"""Patched models with offloaded weights, bfloat16 weights, or weights of a GGUF file."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import infllm_flex as ifx
from tests.minicpm import folders
from tests.patch.gguf_files import write_llama
from tests.patch.models import CONFIGS, LONG, SETTINGS, SHORT, build, equal, logits, tokens
from tests.patch.plain_models import Decoder, FusedHeads

PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "cpu",
}


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_in_either_precision(tmp_path, kind, dtype):
    build(kind).to(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype is dtype
    short, long = logits(model, SHORT), logits(model, LONG)
    ifx.patch_model(model, SETTINGS)
    assert equal(logits(model, SHORT), short)
    sparse = logits(model, LONG)
    assert not equal(sparse, long)
    model.save_pretrained(tmp_path / "again")
    again = ifx.patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), SETTINGS)
    assert equal(logits(again, LONG), sparse)
    assert equal(logits(ifx.unpatch_model(model), LONG), long)


def offloaded(folder, places=PLACES):
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=folder / "offload"
    )


def test_a_model_on_disk(accelerate, tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    short, long = logits(model, SHORT), logits(model, LONG)
    sparse = logits(ifx.patch_model(model, SETTINGS), LONG)
    on_disk = ifx.patch_model(offloaded(tmp_path), SETTINGS)
    assert equal(logits(on_disk, SHORT), short)
    assert equal(logits(on_disk, LONG), sparse)
    assert on_disk.model.layers[0].self_attn.q_proj.weight.is_meta  # still offloaded
    prompt = tokens(SHORT - 2)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    assert equal(on_disk.generate(prompt, **arguments), model.generate(prompt, **arguments))
    with ifx.dense(on_disk):
        assert equal(logits(on_disk, LONG), long)
    assert equal(logits(ifx.unpatch_model(on_disk), LONG), long)


def test_a_minicpm_on_disk(accelerate, tmp_path):
    folders.write(tmp_path / "m", folders.config(num_hidden_layers=2))
    ids = torch.randint(64, (1, 60))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids).logits
        assert equal(offloaded(tmp_path / "m")(ids).logits, expected)


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("undone_first", [True, False])
def test_hand_written_layers_under_hooks(accelerate, tmp_path, patched_first, undone_first):
    model = Decoder(FusedHeads).eval()
    places = {"wte": "cpu", "wpe": "cpu", "h.0": "disk", "h.1": "cpu", "head": "cpu"}
    ids = torch.randint(64, (1, LONG))

    def put_off():
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)

    with torch.no_grad():
        dense = model(ids)
        sparse = ifx.patch_model(model, SETTINGS)(ids)
        if not patched_first:
            ifx.unpatch_model(model)
        put_off()
        assert "forward" in vars(model.h[0].attn)
        ifx.patch_model(model, SETTINGS)  # patching twice
        assert equal(model(ids), sparse)
        if undone_first:
            ifx.unpatch_model(model)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert equal(model(ids), dense if undone_first else sparse)
        ifx.patch_model(model, SETTINGS)
        assert equal(model(ids), sparse)
        assert equal(ifx.unpatch_model(model)(ids), dense)


def test_another_forward_on_the_instance_is_refused():
    model = Decoder(FusedHeads)
    for block in model.h:
        block.attn.forward = lambda x: x
    with pytest.raises(ifx.UnsupportedModelError, match="a forward set on the instance"):
        ifx.patch_model(model, SETTINGS)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_gguf_file(accelerate, tmp_path, quantised):
    pytest.importorskip("gguf")  # transformers reads by it
    write_llama(tmp_path / "tiny.gguf", CONFIGS["llama"](), quantised)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert 0.2 < model.model.layers[1].mlp.up_proj.weight.std() < 0.4  # as written
    short, long = logits(model, SHORT), logits(model, LONG)
    twin = build("llama")
    twin.load_state_dict(model.state_dict())
    sparse = logits(ifx.patch_model(twin, SETTINGS), LONG)
    ifx.patch_model(model, SETTINGS)
    assert equal(logits(model, SHORT), short)
    assert equal(logits(model, LONG), sparse)
    assert equal(logits(ifx.unpatch_model(model), LONG), long)


def test_a_model_of_a_gguf_file_is_saved_as_the_readme_says(accelerate, tmp_path):
    pytest.importorskip("gguf")
    write_llama(tmp_path / "tiny.gguf", CONFIGS["llama"](), True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    with pytest.raises(ValueError, match="gguf and is not serializable"):
        model.save_pretrained(tmp_path / "refused")  # the same as unpatched
    sparse = logits(ifx.patch_model(model, SETTINGS), LONG)
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert equal(logits(ifx.patch_model(again, SETTINGS), LONG), sparse)
