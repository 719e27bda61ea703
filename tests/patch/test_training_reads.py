"""In training a patched model reads no value of the device that the unpatched model does not.

Where documents are is asked for when the forward begins, and read before the first attention.
"""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import infllm_flex as ifx
from infllm_flex.patch import forward_context, host_read
from infllm_flex.patch.forward_context import count_documents
from infllm_flex.patch.huggingface import masks
from infllm_flex.patch.huggingface.documents import open_documents
from tests.patch.models import SETTINGS, build, enable_checkpointing
from tests.patch.packed import IDS, PACKINGS, POSITIONS, TOTAL

# Operators that wait for a device. Operators of ours run whole: on a GPU they are kernels.
WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}


class Reads(TorchDispatchMode):
    """Counts the reads of values, by the file that asks."""

    def __init__(self):
        super().__init__()
        self.files = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket._qualified_op_name == "aten::index" and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if by_mask or func.overloadpacket._qualified_op_name.removeprefix("aten::") in WAITING:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.files[frame.f_code.co_filename] += 1
        return func(*args, **(kwargs or {}))


CASES = {
    **{name: PACKINGS[name] for name in PACKINGS if name.startswith("positions")},
    "one document": {"position_ids": torch.arange(TOTAL)[None]},
    "one document without cache": {"position_ids": torch.arange(TOTAL)[None], "use_cache": False},
}


def reads_of_step(model, kwargs):
    """Where a forward and a backward read values."""
    model.train()
    with Reads() as reads:
        model(IDS, labels=IDS, **kwargs).loss.backward()
    return reads.files


@pytest.fixture
def events(monkeypatch):
    """In order: where a read was begun, and where an attention layer was called."""
    seen = []

    class Noted(host_read.HostRead):
        def __init__(self, x):
            seen.append("begin")
            super().__init__(x)

    for module in (forward_context, masks):
        monkeypatch.setattr(module, "HostRead", Noted)
    return seen


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dense_len", [SETTINGS["dense_len"], TOTAL + 1], ids=["sparse", "dense"])
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES)
def test_reads_are_begun_before_the_first_layer(kwargs, dense_len, checkpointed, events):
    plain, model = build(), ifx.patch_model(build(), SETTINGS, dense_len=dense_len)
    for each in (plain, model):
        if checkpointed:
            enable_checkpointing(each)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: events.append("layer"))
    reads = reads_of_step(model, kwargs)
    ours = reads.pop(host_read.__file__, 0)
    assert sum(reads.values()) <= sum(reads_of_step(plain, kwargs).values())
    begun = events.count("begin")
    assert events[:begun] == ["begin"] * begun
    assert ours == begun
    assert 1 <= begun <= 2


@pytest.mark.parametrize(
    "positions",
    [
        POSITIONS,
        torch.arange(9)[None],
        torch.zeros(1, 9, dtype=torch.int64),  # one document that stays at 0
        torch.tensor([[0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 2, 3]]),
        torch.tensor([[5, 6, 3, 3, 4, 0]]),
    ],
    ids=["packed", "one", "zeros", "short ones", "back to 3"],
)
def test_documents_are_counted_as_they_are_opened(positions):
    assert count_documents(positions) == open_documents(positions).sum(-1).max()
