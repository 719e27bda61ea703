"""transformers' continuous batching gives each request what a patched model gives it alone."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import infllm_flex as ifx
from tests.patch.models import SETTINGS, build, tokens

# Dense up to 95 tokens, with 80 tokens of budget. The third turns sparse while it is generated.
BY_POSITION = {**SETTINGS, "dense_by": "position"}
LENGTHS = (150, 40, 91, 97, 120)
PROMPTS = [tokens(length, 1)[0].tolist() for length in LENGTHS]
NEW = 10


def generate(model, prompts=PROMPTS, **settings):
    """The requests of a batch, in order. A step takes 128 tokens, so that prompts come in parts."""
    values = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 128, "return_logprobs": True}
    found = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(**(values | settings)),
        progress_bar=False,
    )
    return list(found.values())


def log_probabilities(model, request):
    """Score the generated tokens by one call over all tokens; return the likeliest ones, too."""
    ids = torch.tensor([request.prompt_ids + request.generated_tokens])
    with torch.no_grad():
        found = model(ids).logits[0, -NEW - 1 : -1].log_softmax(-1)
    return found.gather(1, ids[0, -NEW:, None])[:, 0], found.argmax(-1).tolist()


def assert_as_alone(model, requests):
    assert len(requests) == len(PROMPTS)
    for request, prompt in zip(requests, PROMPTS, strict=True):
        assert request.error is None
        assert request.prompt_ids == prompt
        expected, likeliest = log_probabilities(model, request)
        assert request.generated_tokens == likeliest
        torch.testing.assert_close(torch.tensor(request.logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"page_size": 64, "num_blocks": 24},
        {"max_batch_tokens": 24},  # parts of few tokens go through decode steps
        {"num_blocks": 14},  # requests wait for room, and are computed again
        {"allow_block_sharing": False},
    ],
    ids=str,
)
def test_each_request_gets_what_it_gets_alone(settings):
    model = ifx.patch_model(build(), BY_POSITION)
    assert_as_alone(model, generate(model, **settings))


@pytest.mark.parametrize(
    "changes",
    [
        {"pool_queries": True, "kernel_size": 4},
        {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1},
        {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1, "score_dims": 4},
        {"lse": "exact"},
    ],
    ids=str,
)
def test_whatever_scores_the_blocks(changes):
    model = ifx.patch_model(build("qwen3"), BY_POSITION, **changes)
    assert_as_alone(model, generate(model))


def test_it_is_sparse_and_equals_generate():
    model = build()
    dense = generate(model)
    ifx.patch_model(model, BY_POSITION)
    sparse = generate(model)
    for length, ours, before in zip(LENGTHS, sparse, dense, strict=True):
        same = ours.generated_tokens == before.generated_tokens
        assert same == (length + NEW < 96)
        ids = torch.tensor([ours.prompt_ids])
        options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None}
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert alone[0, length:].tolist() == ours.generated_tokens


def test_it_goes_by_position_whatever_the_model_does_elsewhere_and_says_so_once(caplog):
    model = ifx.patch_model(build(), SETTINGS, init_blocks=0)  # settings of no other test
    with caplog.at_level("WARNING", "infllm_flex"):
        by_sequence = generate(model)
        generate(model, PROMPTS[:1])
    (said,) = [record.message for record in caplog.records if record.name.startswith("infllm_flex")]
    assert "dense up to position 94 of each request" in said
    assert "a whole prompt of 96 tokens or more sparse from position 80 on" in said
    ifx.patch_model(model, BY_POSITION, init_blocks=0)
    caplog.clear()
    assert_as_alone(model, by_sequence)
    assert_as_alone(model, generate(model))
    assert not [record for record in caplog.records if record.name.startswith("infllm_flex")]


def test_a_shared_prefix_is_read_from_its_pages():
    model = ifx.patch_model(build(), BY_POSITION)
    prefix = PROMPTS[0][:112]
    prompts = [prefix + tokens(n, 1)[0].tolist() for n in (9, 20, 33)]
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=64, max_batch_tokens=160, return_logprobs=True
        ),
    ) as manager:
        for number, prompt in enumerate(prompts):  # one after the other: each finds the last one's
            manager.add_request(prompt, request_id=str(number))
            found = manager.get_result(str(number), timeout=60)
            while not found.is_finished():
                found = manager.get_result(str(number), timeout=60)
            expected, likeliest = log_probabilities(model, found)
            assert found.generated_tokens == likeliest
            torch.testing.assert_close(torch.tensor(found.logprobs), expected, rtol=0, atol=1e-4)


def test_below_dense_len_nothing_changes():
    model = build()
    before = generate(model)
    after = generate(ifx.patch_model(model, {**BY_POSITION, "dense_len": 161}))
    for ours, plain in zip(after, before, strict=True):
        assert ours.generated_tokens == plain.generated_tokens
        assert ours.logprobs == plain.logprobs


def test_an_eager_model_is_refused_at_the_start_and_stays_sparse():
    model = ifx.patch_model(build(attn_implementation="eager"), BY_POSITION)
    with torch.no_grad():
        before = model(tokens(150)).logits
        with pytest.raises(
            NotImplementedError, match="got 'eager'; or call unpatch_model"
        ) as error:
            generate(model)
        assert "\n" not in str(error.value)
        assert torch.equal(model(tokens(150)).logits, before)
    assert all(row.sparse for row in ifx.describe(model))
    ifx.unpatch_model(model)
    assert model.config._attn_implementation == "eager"
    assert all(request.error is None for request in generate(model))


def test_another_implementation_set_after_patching_is_refused_in_the_first_step():
    model = ifx.patch_model(build(), BY_POSITION)
    model.set_attn_implementation("sdpa")  # as continuous batching does with flash attention
    for request in generate(model):
        assert "would attend densely, by attn_implementation='sdpa', in a model" in request.error
        assert request.generated_tokens == []
    ifx.unpatch_model(model)
    assert all(request.error is None for request in generate(model))
