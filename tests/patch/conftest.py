import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    # The models are so small that more threads would only wait for one another.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
