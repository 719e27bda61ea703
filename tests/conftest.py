from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("hypothesis"):
    from hypothesis import settings

    # A test that passed on one commit passes on it again; `--hypothesis-profile=default` explores.
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where tests put the tensors that they make nowhere in particular: tests/decoding, "
        "tests/patch/test_generate.py and tests/patch/test_cache_kinds.py pass on cuda, too",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))
        # generate() compiles static caches on a GPU; float32 is what the tests want there.
        config.addinivalue_line("filterwarnings", "ignore:TensorFloat32 tensor cores:UserWarning")
        # PyTorch opens the memory pool of its CUDA graphs with a graph of nothing.
        config.addinivalue_line("filterwarnings", "ignore:The CUDA Graph is empty:UserWarning")
        # Some of the Triton code that PyTorch 2.11 generates.
        config.addinivalue_line("filterwarnings", "ignore:tl.where with a non-bool:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The tests of Triton kernels: `scripts/test` runs these once more, by Triton's interpreter.
    for item in items:
        if Path(item.path).stem.endswith("_kernel"):
            item.add_marker("kernel")
