from collections.abc import Iterator

import pytest
import torch

from tests.custom_ops.harness import INTERPRETED
from tests.custom_ops.quick_interpreter import hasten_interpreter

if INTERPRETED:
    hasten_interpreter()


@pytest.fixture(autouse=True)
def uninitialised_memory_is_poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make ``torch.empty`` hand out NaN and the largest integer during a test of a kernel."""
    if "kernel" not in request.keywords:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
