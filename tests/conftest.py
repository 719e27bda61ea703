import gc
import os
from importlib.util import find_spec
from pathlib import Path

# The graphs that Inductor keeps on disk know an operator by its name alone. A graph of another
# commit, where the operator had other outputs, would be run. Compiled C++ is still kept.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest
import torch

if find_spec("hypothesis"):
    from hypothesis import settings

    # Every run draws the same examples; `--hypothesis-profile=default` draws new ones.
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="default device of the tests' tensors; tests/decoding, and test_generate, "
        "test_cache_changes, test_static_cache and test_cache_kinds of tests/patch also pass on "
        "cuda",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))
        # generate() compiles static caches on a GPU and then recommends TF32; tests need float32.
        config.addinivalue_line("filterwarnings", "ignore:TensorFloat32 tensor cores:UserWarning")
        # PyTorch captures an empty graph to create the memory pool of its CUDA graphs.
        config.addinivalue_line("filterwarnings", "ignore:The CUDA Graph is empty:UserWarning")
        # PyTorch 2.11 generates such Triton code.
        config.addinivalue_line("filterwarnings", "ignore:tl.where with a non-bool:UserWarning")


@pytest.fixture(autouse=True, scope="module")
def freeze_loaded_objects() -> None:
    """Spare each search for garbage the modules and tests, which outlive it: a quarter of the time.

    Only the objects that a test makes are searched.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The one place that sets the marker `kernel`: every test in a file named test_*_kernel.py gets
    # it. `scripts/test` runs these tests in a second process, by Triton's interpreter.
    for item in items:
        if Path(item.path).stem.endswith("_kernel"):
            item.add_marker("kernel")
