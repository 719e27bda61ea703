"""Training text: reading, tokenising, packing and sampling."""

from infllm_flex.training.data.batch import NO_LABEL, Batch
from infllm_flex.training.data.corpus import Corpus, TextFile, held_out_windows, load_corpus
from infllm_flex.training.data.encoding import BYTE_VALUES
from infllm_flex.training.data.errors import DataError
from infllm_flex.training.data.loader import batches
from infllm_flex.training.data.sampler import PackedSampler, Sampler, WindowSampler
from infllm_flex.training.data.text import (
    DocumentText,
    StreamText,
    Text,
    check_vocabulary,
    open_text,
    token_unit,
)

__all__ = [
    "BYTE_VALUES",
    "NO_LABEL",
    "Batch",
    "Corpus",
    "DataError",
    "DocumentText",
    "PackedSampler",
    "Sampler",
    "StreamText",
    "Text",
    "TextFile",
    "WindowSampler",
    "batches",
    "check_vocabulary",
    "held_out_windows",
    "load_corpus",
    "open_text",
    "token_unit",
]
