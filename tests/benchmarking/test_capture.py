"""A captured subject keeps the tensors alive that its CUDA graph reads."""

import contextlib
import gc
import weakref

import torch

from benchmarking import decode


class _Graph:
    def replay(self):
        pass


class _Stream:
    def wait_stream(self, other):
        pass


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch):
    """Without a GPU: graphs and streams that do nothing."""
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, _Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda x: contextlib.nullcontext())
    tensor = torch.ones(3)
    read = weakref.ref(tensor)
    replay = decode._capture(tensor.sum)
    del tensor
    gc.collect()
    replay()
    assert read() is not None
    del replay
    gc.collect()
    assert read() is None
