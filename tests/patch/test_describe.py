import infllm_flex as ifx
from tests.patch.models import SETTINGS, build


def test_rows_of_an_unpatched_model():
    rows = ifx.describe(build())
    assert rows[0][:4] == ("model.layers.0.self_attn", "", False, "dense: not patched")
    assert rows[0].config is None


def test_prints_as_a_table():
    assert str(ifx.describe(ifx.patch_model(build("gemma2"), SETTINGS))).splitlines() == [
        "layer                     patched through  attention",
        "model.layers.0.self_attn  transformers     sliding window 32: left as it was",
        "model.layers.1.self_attn  transformers     sparse from 96 tokens on: 5 blocks of 16",
        "settings: given to patch_model",
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
    assert rows[0].status == "sparse from 32768 tokens on: 96 blocks of 64"
    assert rows[0].config.pool_queries
    assert "models without a sparse_config" in rows[0].origin


def test_tells_the_settings_and_where_they_come_from():
    model = build()
    row = ifx.describe(ifx.patch_model(model))[0]
    assert (row.config.kernel_size, row.config.pool_queries) == (1, True)
    assert "docs/choosing-settings.md" in row.origin
    model.config.sparse_config = SETTINGS
    row = ifx.describe(ifx.patch_model(model))[0]
    assert (row.config, row.origin) == (ifx.InfLLMConfig(**SETTINGS), "the model's sparse_config")
