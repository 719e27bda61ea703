"""The settings of a selection stand in the operators' schemas in the order of the rule."""

import pytest
import torch

from infllm_flex import InfLLMConfig
from infllm_flex.selection import selection_rule
from infllm_flex_ops.selection.rule import SelectionRule, Windows

OPS = torch.ops.infllm_flex


def argument_names(op):
    return [argument.name for argument in op.default._schema.arguments]


@pytest.mark.parametrize(
    ("op", "position"), [(OPS.select_blocks, 4), (OPS.select_cached_blocks, 5)]
)
def test_a_schema_lists_the_rule(op, position):
    names = argument_names(op)[position:]
    assert names[: len(SelectionRule._fields)] == list(SelectionRule._fields)


@pytest.mark.parametrize(
    ("op", "position"), [(OPS.select_blocks_pooled, 3), (OPS.select_cached_blocks_pooled, 4)]
)
def test_a_pooled_schema_lists_what_makes_a_rule(op, position):
    names = argument_names(op)[position : position + 5]
    assert names == ["window", "block_size", "init_blocks", "local_blocks", "num_selected"]
    rule = SelectionRule.from_pooled(*range(1, 6))
    assert rule == SelectionRule(1, 1, 1, 1, 2, 3, 4, 5)
    assert rule.pooled == (1, 2, 3, 4, 5)


def test_settings_make_a_rule():
    rule = selection_rule(InfLLMConfig())
    assert rule == SelectionRule(32, 16, 128, 64, 64, 1, 32, 96)
    assert selection_rule(InfLLMConfig(), 7) == rule._replace(num_selected=7)
    exact = selection_rule(InfLLMConfig(lse="exact"))
    assert exact.coarse_windows == exact.windows == Windows(32, 16)


def test_splits_the_arguments_of_an_operator():
    args = (*range(8), "scale", "documents")
    rule, others = SelectionRule.split(args)
    assert rule == tuple(range(8))
    assert others == ("scale", "documents")


@pytest.mark.parametrize(("kv_len", "slots"), [(1, 1), (64, 1), (65, 2), (6144, 96), (6200, 96)])
def test_a_list_has_the_budget_or_every_block(kv_len, slots):
    assert SelectionRule(32, 16, 128, 64, 64, 1, 32, 96).num_slots(kv_len) == slots
