"""The measured differences are those of the model's own log-probabilities."""

import csv
from random import Random

import pytest
import torch

import infllm_flex as ifx
import switch_rules
from evaluation.switch_rules import Row, compare, difference, log_probabilities, regions
from tests.evaluation.quality.tiny import make_base, words
from tests.inputs import small_config
from tests.patch.models import build, tokens

CONFIG = small_config(dense_len=120, engine="fused")  # 80 tokens of budget


def test_the_regions_are_where_the_rules_differ_and_what_follows():
    between, after = regions(CONFIG, 150)
    assert between == ("between", 80, 118)
    assert after == ("after", 119, 148)
    model, text = build(), tokens(150, 1)[0]
    ours, theirs = (log_probabilities(model, CONFIG, rule, text) for rule in ("position", "dense"))
    by_sequence = log_probabilities(model, CONFIG, "sequence", text)
    assert (ours - theirs)[:119].abs().max() < 1e-4
    assert (ours - theirs)[119:].abs().max() > 1e-2
    assert (ours - by_sequence)[:80].abs().max() < 1e-4
    assert (ours - by_sequence)[80:119].abs().max() > 1e-2


def test_log_probabilities_are_those_of_the_patched_model():
    model, text = build(), tokens(150, 1)[0]
    ours = log_probabilities(model, CONFIG, "position", text)
    patched = ifx.patch_model(build(), small_config(dense_len=120, dense_by="position"))
    with torch.no_grad():
        all_of_them = patched(text[None]).logits[0].log_softmax(-1)
    expected = torch.stack([all_of_them[i, text[i + 1]] for i in range(149)])
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=1e-4)


def test_rows_hold_means_over_the_region():
    model, text = build(), tokens(150, 1)[0]
    (rows,) = compare(model, CONFIG, {"a": text})
    by_rule = {row.rule: row for row in rows if row.region.name == "after"}
    values = {rule: log_probabilities(model, CONFIG, rule, text)[119:149] for rule in by_rule}
    change = (values["position"] - values["sequence"]).abs()
    assert by_rule["position"].nats == pytest.approx(-float(values["position"].mean()))
    assert by_rule["position"].mean == pytest.approx(float(change.mean()))
    assert by_rule["position"].largest == pytest.approx(float(change.max()))
    assert by_rule["sequence"].mean == 0


def test_a_difference_has_an_interval_over_texts():
    (where, _) = regions(CONFIG, 150)
    rows = [
        Row(name, where, rule, nats, mean, mean)
        for name, ours, mean in (("a", 2.0, 0.1), ("b", 3.0, 0.3), ("c", 3.5, 0.2))
        for rule, nats, mean in (("sequence", 2.0, 0.0), ("position", ours, mean))
    ]
    nats, change, largest = difference(rows, "between", "position")
    assert nats.value == pytest.approx(2.5 / 3)
    # Student's interval over three texts.
    assert (nats.low, nats.high) == pytest.approx((2.5 / 3 - 1.897, 2.5 / 3 + 1.897), abs=2e-3)
    assert 0 == change.low < change.value < change.high
    assert (change.value, largest) == (pytest.approx(0.2), 0.3)


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({"dense_len": 81}, 150, "dense_len must exceed the budget of 80 tokens by 2 or more"),
        ({}, 120, "length must exceed dense_len = 120, got 120"),
    ],
)
def test_settings_without_a_difference_are_refused(changes, length, message):
    with pytest.raises(ValueError, match=message):
        regions(small_config(**{"dense_len": 120, **changes}), length)


def test_the_command_prints_a_table_and_adds_rows(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    texts = [tmp_path / name for name in ("a", "b")]
    for number, path in enumerate(texts):
        path.write_text(" ".join(Random(number).choices(words(), k=400)))
    settings = ["block_size=16", "window_size=32", "topk=3", "dense_len=120", "engine=fused"]
    settings = [f"attention.{setting}" for setting in settings]
    common = [*settings, "--model", str(base), "--text", *map(str, texts)]
    table = tmp_path / "table.csv"
    for _ in range(2):
        assert switch_rules.main([*common, "--length", "200", "--csv", str(table)]) == 0
    out = capsys.readouterr().out
    assert "80 to 118" in out
    assert "119 to 198" in out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 3
    assert {row["budget"] for row in rows} == {"80"}
    (tmp_path / "more").mkdir()
    same = tmp_path / "more" / "a"
    same.write_text(texts[1].read_text())
    named = [*common[:-1], str(same), "--length", "200", "--csv", str(tmp_path / "same.csv")]
    assert switch_rules.main(named) == 0  # two files of one name are two texts
    with (tmp_path / "same.csv").open() as file:
        assert {row["text"] for row in csv.DictReader(file)} == {str(texts[0]), str(same)}
    for bad, message in (
        (["--length", "200", "--text", str(texts[0]), str(texts[0])], "name no file twice"),
        (["--length", "9999"], "must have 9999 tokens, got"),
        (["--length", "100"], "length must exceed dense_len"),
    ):
        assert switch_rules.main([*common, *bad]) == 2
        assert message in capsys.readouterr().err
    cut = table.read_text()[:-3]
    table.write_text(cut)
    assert switch_rules.main([*common, "--length", "200", "--csv", str(table)]) == 2
    assert "its last line is cut" in capsys.readouterr().err
    assert table.read_text() == cut
