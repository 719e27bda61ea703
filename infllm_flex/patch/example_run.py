"""Run the user's example once to see which modules attend, and whether they can be sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from infllm_flex.patch.causal_masks import is_biased
from infllm_flex.patch.head_dims import unsupported_head_dims
from infllm_flex.patch.sdpa_calls import SdpaCall
from infllm_flex.patch.skip_reasons import NOT_CAUSAL

Example = Tensor | Sequence[Any] | Mapping[str, Any]


class _SdpaRecorder(TorchFunctionMode):
    """Records for every SDPA call the innermost running module, and why it cannot be sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.skip_reasons: dict[nn.Module, str | None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.running:
            module = self.running[-1]
            reason = self.skip_reasons.get(module) or _find_skip_reason(SdpaCall(*args, **kwargs))
            self.skip_reasons[module] = reason
        return func(*args, **kwargs)

    def begin(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def end(self, *_: Any) -> None:
        self.running.pop()


def record_example(model: nn.Module, example: Example) -> dict[nn.Module, str | None]:
    """Run a model once, without gradients and in evaluation mode, and record what attends.

    Args:
        model: The model, not patched.
        example: Its inputs: one tensor, positional arguments, or keywords.

    Returns:
        Every module that called SDPA, with the reason why it cannot be sparse, or None.
    """
    recorder = _SdpaRecorder()
    training = [module for module in model.modules() if module.training]
    hooks = [
        hook
        for module in model.modules()
        for hook in (
            module.register_forward_pre_hook(recorder.begin),
            module.register_forward_hook(recorder.end, always_call=True),
        )
    ]
    try:
        model.eval()
        with torch.no_grad(), recorder:
            _run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return recorder.skip_reasons


def _run(model: nn.Module, example: Example) -> None:
    if isinstance(example, Tensor):
        model(example)
    elif isinstance(example, Mapping):
        model(**example)
    else:
        model(*example)


def _find_skip_reason(call: SdpaCall) -> str | None:
    if call.is_bidirectional:
        return NOT_CAUSAL
    if call.attn_mask is not None and is_biased(call.attn_mask):
        return "a bias on its logits (ALiBi or the like)"
    return unsupported_head_dims(call.key.shape[-1], call.value.shape[-1])
