"""Unsupported models outside transformers get an error of one line, with the next step."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infllm_flex as ifx
from tests.patch.models import LONG, SETTINGS, SHORT, build, tokens
from tests.patch.plain_models import WIDTH, Block, Decoder, FusedHeads, RepeatedHeads, plain_model


class Bidirectional(FusedHeads):
    """An encoder's attention."""

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Flagged(FusedHeads):
    """Causal or not, by an attribute of the instance."""

    def __init__(self, causal=False):
        super().__init__()
        self.causal = causal

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Hidden(Flagged):
    """The same, but only running it shows whether it is causal."""

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        options = {"is_causal": self.causal}
        y = F.scaled_dot_product_attention(q, k, v, **options)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Diffusion(nn.Module):
    """Convolutions around attention between all pixels."""

    def __init__(self):
        super().__init__()
        self.down, self.attn, self.up = (
            nn.Conv2d(1, WIDTH, 3),
            Bidirectional(),
            nn.Conv2d(WIDTH, 1, 3),
        )


class Biased(FusedHeads):
    """Logits with a bias by distance."""

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        distance = torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None]
        bias = distance.float().masked_fill(distance > 0, float("-inf")) / 8
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Alibi(Biased):
    """The same, with an attribute that says so."""

    def forward(self, x, alibi=None):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=alibi)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Indexed(FusedHeads):
    """Has an indexer that selects keys."""

    def __init__(self):
        super().__init__()
        self.indexer = nn.Linear(WIDTH, 16)


NEVER = {
    "an encoder": (lambda: plain_model(Bidirectional), "2 x not causal"),
    "a flag on the instance": (lambda: plain_model(Flagged), "2 x not causal"),
    "a diffusion model": (Diffusion, "1 x not causal"),
    "ALiBi": (lambda: plain_model(Alibi), "2 x ALiBi"),
    "its own indexer": (lambda: plain_model(Indexed), "2 x the model's own sparse indexer"),
    "a convolution": (lambda: nn.Conv2d(1, 1, 3), "found no attention layer .*; tried"),
    "PyTorch's encoder": (
        lambda: nn.TransformerEncoderLayer(16, 2),
        r"no attention layer but torch\.nn\.MultiheadAttention",
    ),
}


@pytest.mark.parametrize("made", NEVER.values(), ids=NEVER)
def test_what_can_never_be_sparse_is_refused_when_patching(made):
    make, reason = made
    model = make()
    with pytest.raises(ifx.UnsupportedModelError, match=reason) as caught:
        ifx.patch_model(model, SETTINGS)
    assert "\n" not in str(caught.value)
    assert "attention_modules=" in str(caught.value)
    assert not any(row.patched_through for row in ifx.describe(model))


def test_softmax_written_by_hand_is_found_at_the_first_forward():
    model = ifx.patch_model(plain_model("fused", flash=False), SETTINGS)
    with pytest.raises(
        ifx.UnsupportedModelError,
        match=r"FusedHeads attended without torch\.nn\.functional\.scaled_dot_product_attention "
        r".* call infllm_flex\.infllm_attention there",
    ):
        model(tokens(SHORT))


def test_softmax_written_by_hand_is_found_when_patching_with_an_example():
    model = plain_model("fused", flash=False)
    with pytest.raises(ifx.UnsupportedModelError, match="no attention layer but FusedHeads"):
        ifx.patch_model(model, SETTINGS, example_inputs=tokens(8))


def test_attention_to_the_future_is_found_at_the_first_forward():
    model = ifx.patch_model(plain_model(Hidden), SETTINGS)
    with pytest.raises(ifx.UnsupportedModelError, match="which is not causal: only causal"):
        model(tokens(SHORT))


MASKS = {
    "a window": torch.ones(LONG, LONG, dtype=torch.bool).tril().triu(-40),
    "left padding": torch.ones(LONG, LONG, dtype=torch.bool).tril() & (torch.arange(LONG) > 8),
    "documents": torch.block_diag(*[torch.ones(64, 64).tril()] * 2).bool(),
    "a prefix": torch.ones(LONG, LONG, dtype=torch.bool).tril(5),
    "nothing": torch.zeros(LONG, LONG, dtype=torch.bool),
}


class Masked(FusedHeads):
    def forward(self, x, mask):
        q, k, v = self.c_attn(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("additive", [False, True])
def test_masks_beyond_causal_are_refused_at_length(mask, additive):
    layer = ifx.patch_model(Masked(), SETTINGS)
    x = torch.randn(1, LONG, WIDTH)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with pytest.raises(ifx.UnsupportedModelError, match="an attention mask beyond plain causal"):
        layer(x, mask)
    with ifx.dense(layer):
        assert layer(x, mask).shape == x.shape


def test_a_bias_is_refused_at_length_or_by_the_example():
    model = ifx.patch_model(plain_model(Biased), SETTINGS)
    model(tokens(SHORT))
    with pytest.raises(ifx.UnsupportedModelError, match="ALiBi or another bias"):
        model(tokens(LONG))
    with pytest.raises(ifx.UnsupportedModelError, match="2 x a bias on its logits"):
        ifx.patch_model(plain_model(Biased), SETTINGS, example_inputs=[tokens(8)])


def test_dropout_is_refused_at_length():
    model = ifx.patch_model(plain_model(), SETTINGS).train()
    for block in model.h:
        block.attn.dropout = 0.1
    with pytest.raises(NotImplementedError, match=r"attention dropout \(0\.1\) yet: got 128 keys"):
        model(tokens(LONG))


class TestAttentionModules:
    def mixed(self):
        """A bidirectional layer before a causal one; only running them shows which is which."""
        causal = iter([False, True])
        return plain_model(lambda: Hidden(causal=next(causal)))

    @pytest.mark.parametrize("names", ["h.1.attn", ["*.1.attn"], "module"])
    def test_only_those_named_are_patched(self, names):
        model = self.mixed()
        names = model.h[1].attn if names == "module" else names
        plain = model(tokens(LONG))
        ifx.patch_model(model, SETTINGS, attention_modules=names)
        rows = {row.name: row.sparse for row in ifx.describe(model)}
        assert rows["h.1.attn"]
        assert not rows["h.0.attn"]
        assert not torch.equal(model(tokens(LONG)), plain)

    def test_a_class_names_all_its_modules(self):
        model = ifx.patch_model(plain_model(), SETTINGS, attention_modules=FusedHeads)
        assert [row.sparse for row in ifx.describe(model)] == [True, True]

    def test_an_example_tells_the_layers_apart(self):
        model = ifx.patch_model(self.mixed(), SETTINGS, example_inputs=(tokens(8),))
        assert [row.status for row in ifx.describe(model)] == [
            "not causal: left as it was",
            "sparse from 96 tokens on: 5 blocks of 16",
        ]
        model(tokens(LONG))
        ifx.patch_model(model, SETTINGS, topk=3, example_inputs={"tokens": tokens(8)})
        assert [row.sparse for row in ifx.describe(model)] == [False, True]

    def test_an_example_leaves_the_model_as_it_was(self):
        model = plain_model().train()
        model.h[0].eval()
        before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
        ifx.patch_model(model, SETTINGS, example_inputs=tokens(8))
        assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before
        assert all(p.grad is None for p in model.parameters())

    def test_a_name_that_no_module_has(self):
        with pytest.raises(ValueError, match=r"has no 'h\.1\.atn' \(did you mean 'h\.1\.attn'\?\)"):
            ifx.patch_model(plain_model(), attention_modules=["h.1.atn"])
        with pytest.raises(ValueError, match="Decoder has no RepeatedHeads"):
            ifx.patch_model(plain_model(), attention_modules=RepeatedHeads)
        with pytest.raises(ValueError, match="must name at least one module, got none"):
            ifx.patch_model(plain_model(), attention_modules=[])
        with pytest.raises(TypeError, match="must hold names, classes or modules, got int"):
            ifx.patch_model(plain_model(), attention_modules=[3])

    def test_a_named_module_that_cannot_be(self):
        model = plain_model()
        model.h[1].attn.forward = model.h[0].attn.forward
        with pytest.raises(
            ifx.UnsupportedModelError, match=r"h\.1\.attn cannot be sparse: a forward"
        ):
            ifx.patch_model(model, SETTINGS, attention_modules=["h.*.attn"])

    def test_a_module_that_never_attends(self):
        model = ifx.patch_model(plain_model(), SETTINGS, attention_modules="h.0.mlp")
        with pytest.raises(ifx.UnsupportedModelError, match="Sequential attended without"):
            model(tokens(SHORT))


def test_attention_in_the_forward_of_a_whole_block_or_model():
    class Whole(FusedHeads):
        def forward(self, x):
            return super().forward(x) + x

    block = Block(nn.Identity())
    block.attn = Whole()
    assert [row.name for row in ifx.describe(ifx.patch_model(block, SETTINGS))] == ["attn"]
    assert [row.name for row in ifx.describe(ifx.patch_model(Whole(), SETTINGS))] == [""]


@pytest.mark.parametrize("function", [ifx.patch_model, ifx.unpatch_model])
class TestWhileTracing:
    def test_by_export(self, function):
        class Careless(Decoder):
            def forward(self, tokens):
                function(self)
                return super().forward(tokens)

        with pytest.raises(RuntimeError, match="called while the model is being traced; call it"):
            torch.export.export(Careless(FusedHeads), (tokens(8),), strict=False)

    def test_by_jit(self, function):
        model = plain_model()

        def careless(x):
            function(model)
            return x

        with pytest.raises(RuntimeError, match="called while the model is being traced; call it"):
            torch.jit.trace(careless, torch.ones(1))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [build, plain_model])
def test_a_trace_of_sparse_attention_is_refused(make):
    model = make().requires_grad_(False)

    def run(ids):
        out = model(ids)
        return getattr(out, "logits", out)

    dense = run(tokens(LONG))
    ifx.patch_model(model, SETTINGS)
    with pytest.raises(NotImplementedError, match="got 128 keys with dense_len = 96; use torch"):
        torch.jit.trace(run, tokens(LONG), check_trace=False)
    with ifx.dense(model):
        traced = torch.jit.trace(run, tokens(LONG), check_trace=False)
    assert torch.equal(traced(tokens(LONG)), dense)


def test_torchscript():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(
        ifx.UnsupportedModelError, match="TorchScript, whose code cannot be changed"
    ):
        ifx.patch_model(scripted)


def test_unpatching_what_was_never_patched():
    with pytest.raises(ValueError, match=r"^Decoder is not patched: there is nothing to undo$"):
        ifx.unpatch_model(plain_model())
    with pytest.raises(ValueError, match="Decoder is not patched"), ifx.dense(plain_model()):
        pass


def test_unpatching_after_another_class_was_put_on_top():
    model = ifx.patch_model(plain_model(), SETTINGS)
    attn = model.h[1].attn
    attn.__class__ = type("FSDPFusedHeads", (type(attn),), {})
    with pytest.raises(
        ValueError, match=r"replaced since: FSDPFusedHeads .*unpatch before sharding"
    ):
        ifx.unpatch_model(model)
    assert [row.sparse for row in ifx.describe(model)] == [True, True], "nothing may be half undone"
