"""torchtitan builds its models with the attention of examples/torchtitan_override.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

import infllm_flex as ifx
from tests.tolerance import assert_within_rounding
from tests.training.runs import ATTENTION

pytest.importorskip("torchtitan", reason="not among the dependencies: pip install torchtitan")

TARGET = "torchtitan_override.sparse_attention"
SETTINGS = {
    "kernel_size": 4,
    "kernel_stride": 2,
    "block_size": 8,
    "window_size": 8,
    "topk": 2,
    "dense_len": 64,
}


@pytest.fixture(scope="module", autouse=True)
def _on_the_path():
    folder = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


def overridden(settings):
    """The configuration of torchtitan's small Llama, as its trainer changes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchtitan's own
        from torchtitan.config.override import OverrideConfig, apply_overrides
        from torchtitan.models.llama3 import model_registry

        config = model_registry("debugmodel", attn_backend="varlen").model
        said = apply_overrides(OverrideConfig(imports=[(TARGET, settings)]), config)
    return config, said


def test_every_layer_of_a_model_is_replaced_and_built():
    config, said = overridden(SETTINGS)
    assert len(said) == len(config.layers) == 6
    for layer in config.layers:
        attention = layer.attention.build().inner_attention
        assert type(attention).__name__ == "SparseAttention"
        assert attention._config == ATTENTION


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"'top_k'.*did you mean topk"):
        overridden({"top_k": 2})


def test_documents_of_two_packed_rows_attend_as_they_would_alone():
    from torchtitan.models.common.attention import VarlenMetadata

    attention = overridden(SETTINGS)[0].layers[0].attention.inner_attention.build()
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 128, n, 16, generator=random) for n in (4, 2, 2))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    borders = [0, 100, 128, 133, 256]  # one dense and one sparse document in each row
    metadata = VarlenMetadata(
        cu_seq_q=torch.tensor(borders, dtype=torch.int32),
        cu_seq_k=torch.tensor(borders, dtype=torch.int32),
        max_q=123,
        max_k=123,
    )
    out = attention(*leaves, attention_masks=metadata, enable_gqa=True)
    assert out.shape == query.shape
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    for row, start, end in ((0, 0, 100), (0, 100, 128), (1, 0, 5), (1, 5, 128)):
        alone = [x.detach()[row : row + 1, start:end].transpose(1, 2) for x in leaves]
        expected = ifx.infllm_attention(*alone, ATTENTION)
        exact = ifx.infllm_attention(*(x.double() for x in alone), ATTENTION)
        ours = out.detach()[row : row + 1, start:end].transpose(1, 2)
        assert_within_rounding(ours, exact, expected)
