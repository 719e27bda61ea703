"""Launch the selection kernels from the flat arguments that the operators take."""

from typing import Any

from torch import Tensor

from infllm_flex_ops import (
    select_blocks,
    select_blocks_pooled,
    select_cached_blocks,
    select_cached_blocks_pooled,
)


def _launch(op: Any, args: tuple[Any, ...]) -> Tensor:
    return op.launcher()(*op.pack(*args))


def launch_select(*args: Any) -> Tensor:
    return _launch(select_blocks, args)


def launch_select_pooled(*args: Any) -> Tensor:
    return _launch(select_blocks_pooled, args)


def launch_select_cached(*args: Any) -> Tensor:
    return _launch(select_cached_blocks, args)


def launch_select_cached_pooled(*args: Any) -> Tensor:
    return _launch(select_cached_blocks_pooled, args)
