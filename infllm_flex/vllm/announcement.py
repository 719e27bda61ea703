"""The lines in vLLM's log about a model that is served sparsely."""

from __future__ import annotations

from infllm_flex.patch.settings import Resolved
from infllm_flex.vllm.page_layout import extra_share


def describe_served(served: Resolved, page_size: int | None) -> list[str]:
    """Say in a line or two what will be served.

    Args:
        served: Settings and their origin.
        page_size: Tokens of a page; None if it is not known yet.
    """
    config, origin = served
    lines = [
        f"InfLLM-V2 by {origin}: positions from {config.longest_dense} on attend to "
        f"{config.num_selected} blocks of {config.block_size} keys, earlier ones to all."
    ]
    if config.scores_keys:
        lines[0] += " Every key is scored, and nothing is kept beside keys and values."
    elif config.score_dims:
        lines[0] += (
            f" Every key is scored in {config.score_dims} of its dims, a copy of which is kept."
            if config.kernel_size == 1
            else f" Compressed keys have {config.score_dims} dims."
        )
    elif page_size is not None:
        share = extra_share(config, page_size)
        lines[0] += f" Compressed keys add {share:.1%} to pages of {page_size} tokens."
    if config.dense_by == "sequence" and config.longest_dense > config.budget_tokens:
        first, last = config.budget_tokens, config.longest_dense - 1
        lines.append(
            f"InfLLM-V2: positions {first} to {last} of longer prompts attend to all keys, while "
            "a model with dense_by = 'sequence' was trained with blocks there."
        )
    return lines
