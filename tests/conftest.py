from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The tests of Triton kernels: `scripts/test` runs these once more, by Triton's interpreter.
    for item in items:
        if Path(item.path).stem.endswith("_kernel"):
            item.add_marker("kernel")
