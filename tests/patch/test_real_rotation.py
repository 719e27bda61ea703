"""A layer is known to rotate halves only if its queries and keys really turn so with position.

The code of every causal LM type of transformers is asked; some always, all with --slow.
"""

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from infllm_flex.patch import discovery
from infllm_flex.patch.rotary_layout import suits_score_dims
from tests.patch.families.tiny import TYPES, NotBuiltError, build

RECORD = "record_keys"
FEW = 4  # score_dims that every head has
# In the second row some layers of a model get no rotary embedding, or the whole model has none.
ASKED = (
    *("llama", "gemma3_text", "gpt_neox", "cohere", "olmo_hybrid", "lfm3"),
    *("lara_mini", "beam", "granitemoehybrid"),
)
KNOWN = {"llama", "gemma3_text", "olmo_hybrid", "lfm3"}
RUNS_LAYERS_AGAIN = {"hrm_text"}  # on other states, which depend on positions

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's models


def keys_of(model, layers, positions):
    """The keys of each layer, where no layer hands on what it attended to."""
    found = {}

    def record(module, query, key, value, attention_mask=None, **kwargs):
        found[module] = key.double()
        B, Hq, n, _ = query.shape
        return torch.zeros(B, n, Hq, value.shape[-1]), None

    AttentionInterface.register(RECORD, record)
    AttentionMaskInterface.register(RECORD, sdpa_mask)
    model.set_attn_implementation(RECORD)
    ids = torch.full((1, 4), 5)
    model(input_ids=ids, position_ids=positions[None], use_cache=False)
    return [found[layer] for layer in layers.values()]


def turns_by_halves(still, turned):
    """Whether dim i turned with dim i + D / 2, by angles that fall from dim to dim."""
    pairs = [torch.complex(*keys[0, :, 1].chunk(2, -1)) for keys in (still, turned)]
    ratio = pairs[1] / pairs[0]
    angles = ratio.angle().abs().mean(0)
    is_rotation = bool(((ratio.abs() - 1).abs() < 1e-3).all())
    return is_rotation and bool(angles[0] > 1e-3) and bool((angles.diff() <= 1e-6).all())


@torch.no_grad()
def check(model_type):
    """Return whether the layers are known to rotate halves, where they do if that is known."""
    try:
        model = build(model_type)
    except NotBuiltError as error:
        pytest.skip(str(error))
    layers = discovery.sparse_modules(discovery.find_layers(model))
    together = suits_score_dims(model, layers, FEW)
    alone = all(suits_score_dims(None, {name: x}, FEW) for name, x in layers.items())
    if (together or (layers and alone)) and model_type not in RUNS_LAYERS_AGAIN:
        still = keys_of(model, layers, torch.zeros(4, dtype=torch.long))
        turned = keys_of(model, layers, torch.arange(4))
        for name, *keys in zip(layers, still, turned, strict=True):
            assert turns_by_halves(*keys), name
    return together


@pytest.mark.parametrize("model_type", ASKED)
def test_what_is_known_is_true(model_type):
    if model_type not in TYPES:
        pytest.skip("not in this version of transformers")
    assert check(model_type) == (model_type in KNOWN)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*TYPES} - {*ASKED}))
def test_what_is_known_is_true_of_every_type(model_type):
    check(model_type)
