"""Every causal LM type of transformers against itself unpatched: some always, all with --slow.

`scripts/families.py` asks the same of all of them and writes docs/models.md.
"""

import pytest

from tests.patch.families.examine import NOT_BUILT, REFUSED, SOUND, examine
from tests.patch.families.tiny import TYPES

# One for each kind of attention, of cache, and of passing positions to layers.
SOUND_TYPES = ("exaone4", "gemma4_unified", "gpt_bigcode", "opt", "qwen3_5_text", "zamba")
REFUSED_TYPES = {
    "deepseek_v2": "as wide as keys",
    "deepseek_v32": "it is sparse already",
    "doge": "adds nothing to its logits",
    "gemma2": "set the cap to None",
    "gemma4_assistant": "patch the model that it drafts for",
    "git": "only causal",
    "gpt_oss": "has no sinks",
    "mamba": "nothing to make sparse",
    "moshi": "sliding_window=None",
    "mpt": "call infllm_flex.infllm_attention",
}

# Warnings of other people's models are not judged here.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("model_type", SOUND_TYPES)
def test_a_type_is_sound(model_type):
    verdict = examine(model_type)
    assert verdict.result == SOUND, (verdict.why, *verdict.faults)
    assert verdict.sparse > 0


@pytest.mark.parametrize(("model_type", "words"), REFUSED_TYPES.items())
def test_a_type_is_refused_with_what_to_do(model_type, words):
    verdict = examine(model_type)
    assert verdict.result == REFUSED
    assert words in verdict.why


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*TYPES} - {*SOUND_TYPES, *REFUSED_TYPES}))
def test_every_type_is_sound_or_refused(model_type):
    verdict = examine(model_type)
    if verdict.result == NOT_BUILT:
        pytest.skip(verdict.why)
    assert verdict.result in (SOUND, REFUSED), verdict.faults
