"""The parts of a comparison, and the attention that each depends on."""

from __future__ import annotations

import torch

from evaluation.quality.arms import attention_modes
from evaluation.quality.plan import plan
from evaluation.quality.settings import QualitySettings
from evaluation.quality.tuning import training_settings
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from tests.checkout import ROOT
from tests.evaluation.quality.tiny import write_settings


def test_the_config_gives_all_variants_and_controls_as_many_tokens():
    path = ROOT / "configs" / "quality_smollm2_16k.yaml"
    settings = build_dataclass(QualitySettings, load_yaml(path))
    visible = {mode.visible(settings.length) for mode in attention_modes(settings).values()}
    assert visible == {2048, 16384}
    window, random = (attention_modes(settings)[name].attention for name in ("window", "random"))
    for control in (window, random):  # controls ignore scores, hence have cheap ones
        assert control.kernel_stride == control.block_size // 4
        assert control.block_size == settings.control_attention.block_size
    assert random.window_size == settings.control_attention.window_size
    forced = window.init_blocks + window.local_blocks + 1
    assert window.num_selected == forced == settings.control_attention.num_selected


def test_new_variants_leave_what_is_done_alone(config):
    settings = build_dataclass(QualitySettings, load_yaml(config))
    import yaml

    described = yaml.safe_load(config.read_text())
    other = dict(described["variants"]["fine"]["attention"]) | {"topk": 12}
    described["variants"]["wide"] = {"attention": other}
    described["variants"]["taught"] = {"attention": other, "selection_loss": {"weight": 0.5}}
    write_settings(config, described)
    more = build_dataclass(QualitySettings, load_yaml(config))
    after = {part.name: part.settings for part in plan(more)}
    for part in plan(settings):
        assert after[part.name] == part.settings
    without, taught = (after[f"train:{name}:0"][name] for name in ("wide", "taught"))
    assert taught.pop("selection_loss") == {"weight": 0.5, "every": 1, "queries": 256}
    assert taught == without
    place = more.base.folder
    recipe = training_settings(
        more, attention_modes(more)["taught"], 0, place, place, torch.device("cpu")
    )
    assert recipe.stages["long"].selection_loss.weight == 0.5
