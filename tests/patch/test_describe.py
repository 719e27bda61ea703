import infllm_flex as ifx
from tests.patch.models import SETTINGS, build


def test_rows_of_an_unpatched_model():
    rows = ifx.describe(build())
    assert list(rows[0]) == ["model.layers.0.self_attn", "", False, "dense: not patched"]


def test_prints_as_a_table():
    assert str(ifx.describe(ifx.patch_model(build("gemma2"), SETTINGS))).splitlines() == [
        "layer                     patched through  attention",
        "model.layers.0.self_attn  transformers     sliding window 32: left as it was",
        "model.layers.1.self_attn  transformers     sparse from 96 tokens on: 3 blocks of 16",
    ]


def test_is_a_sequence_of_rows():
    rows = ifx.describe(ifx.patch_model(build("gemma2"), SETTINGS))
    assert len(rows) == 2
    assert [row.name for row in rows if row.sparse] == ["model.layers.1.self_attn"]


def test_tells_of_a_dense_block():
    model = ifx.patch_model(build(), SETTINGS)
    with ifx.dense(model):
        assert {row.status for row in ifx.describe(model)} == {"dense: inside infllm_flex.dense()"}


def test_a_model_built_with_the_implementation():
    rows = ifx.describe(build(attn_implementation="infllm_flex"))
    assert rows[0].status == "sparse from 8192 tokens on: 96 blocks of 64"
