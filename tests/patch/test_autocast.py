"""Generation under autocast, where caches hold float32 keys beside bfloat16 values."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import infllm_flex as ifx
from tests.patch.models import CACHE, FULL_ATTENTION, SETTINGS, build, tokens

GROWING = {**SETTINGS, "dense_len": 48, "topk": 4}
EVERYTHING = {**GROWING, "topk": 16}
PARTS = {"steps": [70, *[1] * 20], "chunks": [70, 20], "drafts": [70, 5, 1, 14]}


def new_cache(model, kind):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=120)


def in_parts(model, ids, sizes, kind, mask=None):
    cache, out, end = new_cache(model, kind), [], 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for part in ids.split(sizes, 1):
            end += part.shape[1]
            kwargs = {} if mask is None else {"attention_mask": mask[:, :end]}
            out.append(model(part, **{CACHE: cache}, **kwargs).logits)
    return torch.cat(out, 1).float()


def distance(ours, theirs):
    return (ours - theirs).norm() / theirs.norm()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_with_every_block_selected_it_is_as_near_as_the_unpatched_model(family, kind):
    ids = tokens(90)
    with torch.no_grad():
        exact = build(family)(ids, use_cache=False).logits
    plain = {name: in_parts(build(family), ids, sizes, kind) for name, sizes in PARTS.items()}
    model = ifx.patch_model(build(family), EVERYTHING)
    for name, sizes in PARTS.items():
        ours = in_parts(model, ids, sizes, kind)
        assert distance(ours, exact) < 1.2 * distance(plain[name], exact) + 1e-3


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_steps_choose_what_the_full_forward_chooses(family, kind):
    """With one layer, because later layers see rounded inputs."""
    config = build(family).config
    config.num_hidden_layers = 1
    config.layer_types = (
        None if getattr(config, "layer_types", None) is None else ["full_attention"]
    )
    model, ids = ifx.patch_model(build(config), GROWING), tokens(90)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(ids, use_cache=False).logits.float()
        with ifx.dense(model):
            dense = model(ids, use_cache=False).logits.float()
    for sizes in PARTS.values():
        ours = in_parts(model, ids, sizes, kind)
        assert distance(ours, whole) < 0.01 < 0.2 * distance(dense, whole)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padded_rows(kind):
    model, ids = ifx.patch_model(build(), GROWING), tokens(100)
    mask = torch.ones_like(ids)
    mask[0, :23] = 0
    for sizes in ([80, *[1] * 20], [80, 20]):
        ours = in_parts(model, ids * mask, sizes, kind, mask)
        alone = in_parts(model, ids[:1, 23:], [57, *sizes[1:]], kind)
        assert distance(ours[:1, 23:], alone) < 0.03


def test_it_may_come_and_go_within_a_generation():
    model, ids = ifx.patch_model(build(), GROWING), tokens(100)
    cache = new_cache(model, "dynamic")
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        out = []
        for i, part in enumerate(ids.split([80, *[1] * 20], 1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=i % 7 > 3):
                out.append(model(part, **{CACHE: cache}).logits.float())
    assert distance(torch.cat(out, 1)[:, 80:], whole[:, 80:]) < 0.2


def test_generate_and_a_compiled_static_step():
    model, ids = ifx.patch_model(build(), GROWING), tokens(90)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 20}
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert out.shape == (2, 110)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    caches = [new_cache(model, "static") for _ in range(2)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for cache in caches:
            model(ids, **{CACHE: cache})
        for _ in range(3):
            ours, theirs = (
                run(ids[:, :1], **{CACHE: cache}).logits
                for run, cache in zip((compiled, model), caches, strict=True)
            )
            assert ours.dtype == theirs.dtype == torch.bfloat16
            assert distance(ours.float(), theirs.float()) < 0.03
