import pytest

from evaluation.quality.nats import buckets


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
