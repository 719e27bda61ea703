"""After any operation on a cache, its compressed keys equal those compressed from scratch."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from infllm_flex import CompressedKeys
from infllm_flex_ops import compress_keys
from tests.inputs import draw_normal, small_config

D = 6
SLOWEST = {"pool_queries": True, "kernel_size": 4, "score_dims": 4, "score_dtype": "float8"}


class Cache:
    """A cache in plain tensors: rows of keys, padded on the left."""

    def __init__(self, pads, room):
        self.pads = list(pads)
        self.room = room  # slots after the last token, as a preallocated cache has them
        self.keys = torch.zeros(len(self.pads), 2, 0, D)

    def append(self, count, seed):
        new = draw_normal(len(self.pads), 2, count, D, seed=seed)
        self.keys = torch.cat([self.keys, new], 2)

    def all_slots(self):
        return torch.cat([self.keys, torch.full((len(self.pads), 2, self.room, D), torch.nan)], 2)

    def start(self):
        """Slot of each row's first token; a row of padding alone begins after its last slot."""
        return torch.tensor([min(pad, self.keys.shape[2]) for pad in self.pads])


class FollowsACache(RuleBasedStateMachine):
    @initialize(
        pads=st.lists(st.integers(0, 40), min_size=1, max_size=3),
        room=st.sampled_from([0, 5, 1000]),
        scoring=st.sampled_from([{}, {"lse": "exact"}, SLOWEST]),
    )
    def begin(self, pads, room, scoring):
        self.cache = Cache(pads, room)
        self.config = small_config(**scoring)
        self.state = CompressedKeys(self.config, self.cache.all_slots())

    @rule(count=st.integers(0, 70), seed=st.integers(0, 10_000))
    def append(self, count, seed):
        self.cache.append(count, seed)
        self.state.append(self.cache.all_slots(), count, start=self.cache.start())

    @rule(count=st.integers(0, 30))
    def crop(self, count):
        length = max(0, self.cache.keys.shape[2] - count)
        self.cache.keys = self.cache.keys[:, :, :length]
        self.state.crop(count)

    @rule(data=st.data())
    def take_rows(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.cache.pads) - 1), min_size=1, max_size=3))
        self.cache.keys = self.cache.keys[rows]
        self.cache.pads = [self.cache.pads[row] for row in rows]
        self.state.select(torch.tensor(rows))

    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats):
        if len(self.cache.pads) * repeats > 4:
            return
        self.cache.keys = self.cache.keys.repeat_interleave(repeats, 0)
        self.cache.pads = [pad for pad in self.cache.pads for _ in range(repeats)]
        self.state.repeat(repeats)

    @rule()
    def move(self):
        self.state.to(self.cache.keys.device)

    @rule()
    def reset(self):
        self.cache.keys = self.cache.keys[:, :, :0]
        self.state.reset()

    @invariant()
    def equals_compression_from_scratch(self):
        config = self.config
        levels = [(self.state.compressed, config.kernel_size, config.kernel_stride)]
        if config.uses_coarse_keys:
            levels.append((self.state.coarse, config.coarse_size, config.coarse_stride))
        else:
            assert self.state.coarse is self.state.compressed
        assert (self.state.end == self.cache.keys.shape[2]).all()
        for row, pad in enumerate(self.cache.pads):
            for windows, size, stride in levels:
                keys = self.cache.keys[row : row + 1, :, pad:]
                keys = keys[..., [1, 2, 4, 5]] if config.score_dims else keys
                expected = compress_keys(keys, size, stride)[0].to(windows.dtype)
                found = windows[row, :, : expected.shape[1]]
                assert torch.equal(found.float(), expected.float())


FollowsACache.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestFollowsACache = FollowsACache.TestCase


def test_memory_is_reused_while_the_cache_has_room():
    keys = torch.randn(1, 2, 400, D)
    state = CompressedKeys(small_config(), keys)
    state.append(keys, 10)
    addresses = [x.data_ptr() for x in (state.compressed, state.coarse, state.start, state.end)]
    for _ in range(50):
        state.append(keys, 7)
    assert addresses == [
        x.data_ptr() for x in (state.compressed, state.coarse, state.start, state.end)
    ]


def test_memory_grows_seldom():
    state = CompressedKeys(small_config(), torch.zeros(1, 1, 0, 1))
    sizes = set()
    for length in range(40, 3000, 40):
        state.append(torch.zeros(1, 1, length, 1), 40)
        sizes.add(state.compressed.shape[2])
    assert len(sizes) < 8


def test_a_cache_of_another_kind_is_refused():
    state = CompressedKeys(small_config(), torch.zeros(1, 2, 20, D))
    with pytest.raises(ValueError, match=r"key must be \[1, 2, S, 6\], torch.float32"):
        state.append(torch.zeros(2, 2, 20, D), 20)


@pytest.mark.parametrize("key", [torch.zeros(2, 20, D), torch.zeros(1, 2, 20, D).long()])
def test_keys_of_another_shape_or_dtype_are_refused(key):
    with pytest.raises(ValueError, match=r"key must be floating point \[B, Hkv, S, D\], got"):
        CompressedKeys(small_config(), key)
    with pytest.raises(ValueError, match=r"key must be \[1, 2, S, 6\], torch.float32"):
        CompressedKeys(small_config(), torch.zeros(1, 2, 20, D)).append(key, 1)


EVERY_KEY = {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1}


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="a GPU's values are not read")
@pytest.mark.parametrize("scoring", [{}, {"lse": "exact"}, EVERY_KEY], ids=str)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_new": -1}, "num_new must be from 0 to S = 60, got -1"),
        ({"num_new": 61}, "num_new must be from 0 to S = 60, got 61"),
        ({"num_new": 30}, "k must hold 70 slots in row 0, got 60"),
        ({"num_new": 1, "end": torch.tensor([50, 61])}, "k must hold 61 slots in row 1, got 60"),
        ({"num_new": 1, "start": torch.tensor([3, -1])}, "start must be 0 or more, got -1"),
    ],
)
def test_an_append_that_does_not_fit_changes_nothing(scoring, arguments, message):
    config, key = small_config(**scoring), draw_normal(2, 1, 60, D, seed=0)
    ours, expected = (CompressedKeys(config, key) for _ in range(2))
    for state in (ours, expected):
        state.append(key, 40)
    with pytest.raises(ValueError, match=message):
        ours.append(key, **arguments)
    for state in (ours, expected):
        state.append(key, 20)
    for name in ("compressed", "coarse", "start", "end"):
        assert torch.equal(getattr(ours, name), getattr(expected, name))


def test_a_crop_of_less_than_nothing_is_refused():
    state = CompressedKeys(small_config(), torch.zeros(1, 2, 20, D))
    with pytest.raises(ValueError, match="num_removed must be 0 or more, got -2"):
        state.crop(-2)
