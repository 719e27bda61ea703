"""Published peak rates of GPUs, bfloat16 with float32 sums and without sparsity."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: Its name.
        device: Its name in the column ``device`` of measurements; empty: not measured.
        capability: Compute capability.
        processors: Streaming multiprocessors.
        tflops: Matrix products, in 10^12 operations per second.
        terabytes: Memory, in 10^12 bytes per second.
        products_per_cycle: Operations of matrix products of one multiprocessor per cycle.
        source: Where the numbers are published.
    """

    name: str
    device: str
    capability: int
    processors: int
    tflops: float
    terabytes: float
    products_per_cycle: int
    source: str

    @property
    def hertz(self) -> float:
        """The clock at which the peak of matrix products is reached."""
        return self.tflops * 1e12 / self.processors / self.products_per_cycle


H100 = Card(
    *("H100 SXM", "NVIDIA H100 80GB HBM3", 90, 132, 989.4, 3.35, 4096),
    "NVIDIA H100 Tensor Core GPU datasheet",
)
H200 = Card(
    *("H200 SXM", "NVIDIA H200", 90, 132, 989.4, 4.8, 4096),
    "NVIDIA H200 Tensor Core GPU datasheet",
)
OTHERS = (
    Card(
        *("A100 SXM 80 GB", "", 80, 108, 312.0, 2.039, 2048),
        "NVIDIA A100 Tensor Core GPU datasheet",
    ),
    Card(*("L40S", "", 89, 142, 362.05, 0.864, 1024), "NVIDIA L40S datasheet"),
    Card(*("B200", "", 100, 148, 2250.0, 8.0, 8192), "NVIDIA HGX B200 datasheet"),
)
