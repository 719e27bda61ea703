from types import SimpleNamespace

import pytest
import torch

from evaluation.quality.nats import buckets, judge_nats
from infllm_flex.training.data.store import Documents


@pytest.mark.parametrize(
    ("length", "names"),
    [
        (2048, ["1-256", "257-512", "513-1024", "1025-2048"]),
        (300, ["1-37", "38-75", "76-150", "151-300"]),
        (3, ["1-1", "2-3"]),
    ],
)
def test_buckets_cover_every_position_once_and_the_last_is_the_second_half(length, names):
    assert [str(bucket) for bucket in buckets(length)] == names


def test_windows_begin_as_the_tokenizer_begins_sequences():
    read = []

    def nats(batch):
        read.append(batch)
        return torch.zeros(batch.shape[0], batch.shape[1] - 1)

    store = SimpleNamespace(held_out=Documents(torch.arange(100, 150), torch.tensor([0, 50])))
    settings = SimpleNamespace(length=16, judge=SimpleNamespace(windows=3, batch_size=2))
    found = judge_nats(settings, SimpleNamespace(nats=nats), store, [7])
    rows = torch.cat(read)
    assert rows.tolist() == [[7, *range(100 + 16 * n, 116 + 16 * n)] for n in range(3)]
    assert [len(values) for values in found["buckets"].values()] == [3] * 4
