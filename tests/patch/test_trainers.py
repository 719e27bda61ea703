"""A patched tiny model in common trainers and quantizers, a few steps each."""

import copy

import pytest
import torch
from torch import nn

import infllm_flex as ifx
from tests.patch.models import CONFIGS, LONG, SETTINGS, build, logits, tokens
from tests.patch.plain_models import plain_model
from tests.patch.test_training_loops import CountSelections

STEPS, LAYERS = 2, 2
EVERYTHING_AND_VIRTUAL = {**SETTINGS, "topk": 16}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        row = tokens(LONG, batch=STEPS)[index]
        return {"input_ids": row, "labels": row}


def train(model, wrap=lambda model: model):
    """Plain training steps, the reference for the trainers."""
    model = wrap(model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for row in Rows():
        ids = row["input_ids"][None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = ifx.patch_model(build(), SETTINGS)
    expected = train(copy.deepcopy(model))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    with CountSelections() as selections:
        Trainer(model, arguments, train_dataset=Rows()).train()
    assert selections.count == STEPS * LAYERS
    assert_close(logits(model.eval(), LONG), logits(expected, LONG))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    accelerate = pytest.importorskip("accelerate")
    model = ifx.patch_model(build(), SETTINGS)
    expected = train(copy.deepcopy(model))
    accelerator = accelerate.Accelerator(
        mixed_precision=precision, gradient_accumulation_steps=2, cpu=True
    )
    loader = torch.utils.data.DataLoader(Rows(), batch_size=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with CountSelections() as selections:
        for batch in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch, use_cache=False).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert selections.count == STEPS * LAYERS
    assert torch.isfinite(logits(prepared.eval(), LONG)).all()
    assert accelerator.unwrap_model(prepared) is model
    assert not torch.equal(logits(model, LONG), logits(expected, LONG)), "one step for two"
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_of_peft():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def wrap(model):
        torch.manual_seed(0)
        return peft.get_peft_model(model, lora)

    patched_first = train(ifx.patch_model(build(), SETTINGS), wrap)
    patched_last = train(build(), lambda model: ifx.patch_model(wrap(model), SETTINGS))
    assert torch.equal(logits(patched_first, LONG), logits(patched_last, LONG))
    with patched_first.disable_adapter():
        base = logits(patched_first, LONG)
    assert torch.equal(base, logits(ifx.patch_model(build(), SETTINGS), LONG))
    merged = patched_first.merge_and_unload()
    assert_close(logits(merged, LONG), logits(patched_last, LONG))
    assert all(row.sparse for row in ifx.describe(merged))
    assert not any(row.sparse for row in ifx.describe(ifx.unpatch_model(merged)))


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
class TestVirtualTokensOfPeft:
    def wrap(self, kind, model):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=8)
        return peft.get_peft_model(model, config)

    def test_they_train_as_in_an_unpatched_model(self, kind):
        ids = tokens(LONG)
        mask = torch.ones_like(ids)
        gradients = []
        for model in (build(), ifx.patch_model(build(), EVERYTHING_AND_VIRTUAL)):
            wrapped = self.wrap(kind, model).train()
            wrapped(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            gradients += [p.grad for p in wrapped.parameters() if p.requires_grad]
        dense, sparse = gradients
        assert dense.any()
        torch.testing.assert_close(sparse, dense, rtol=1e-3, atol=1e-6)

    def test_padding_after_them_is_refused_with_what_to_do(self, kind):
        model = self.wrap(kind, ifx.patch_model(build(), SETTINGS)).eval()
        ids = tokens(80)
        mask = torch.ones_like(ids)
        mask[1, :20] = 0
        with pytest.raises(RuntimeError, match="put all padding before all tokens"):
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
            )
        with ifx.dense(model):
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20)


def test_lora_of_peft_on_another_model():
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False),
        ifx.patch_model(plain_model(), SETTINGS),
    )
    with CountSelections() as selections:
        model(tokens(LONG)).sum().backward()
    assert selections.count == LAYERS
    assert model.h[0].attn.c_attn.lora_A["default"].weight.grad.any()
    ifx.unpatch_model(model)


MODELS = {
    "transformers": (lambda: build(), lambda model: logits(model, LONG)),
    "generic": (plain_model, lambda model: model(tokens(LONG)).detach()),
}


@pytest.mark.filterwarnings("ignore")  # torchao's own, at import
@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
class TestTorchao:
    def test_int8_weights(self, case):
        quantization = pytest.importorskip("torchao.quantization")
        make, call = case
        model = ifx.patch_model(make(), SETTINGS)
        exact = call(model)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        with CountSelections() as selections:
            ours = call(model)
        assert selections.count == LAYERS
        assert not torch.equal(ours, exact)
        plain = make()
        quantization.quantize_(plain, quantization.Int8WeightOnlyConfig())
        dense = call(plain)
        assert torch.equal(call(ifx.patch_model(plain, SETTINGS)), ours)
        assert torch.equal(call(ifx.unpatch_model(model)), dense)

    def test_training_in_emulated_float8(self, case):
        float8 = pytest.importorskip("torchao.float8")
        make, call = case
        model = ifx.patch_model(make(), SETTINGS)
        exact = call(model)
        float8.convert_to_float8_training(model, config=float8.Float8LinearConfig(emulate=True))
        assert any(type(m).__name__ == "Float8Linear" for m in model.modules())
        with CountSelections() as selections:
            out = model(tokens(LONG))
            getattr(out, "logits", out).square().mean().backward()
        assert selections.count == LAYERS
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        assert all(w.grad is not None and w.grad.isfinite().all() for w in weights)
        assert not torch.equal(call(model), exact)


def test_the_models_here_have_so_many_layers():
    assert CONFIGS["llama"]().num_hidden_layers == LAYERS == len(plain_model().h)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
