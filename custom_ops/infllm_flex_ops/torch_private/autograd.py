"""Private APIs that tell where a backward pass is."""

from __future__ import annotations

import torch


def current_backward() -> int:
    """Return the number of the backward pass that runs in this thread, -1 without one.

    API: ``torch._C._current_graph_task_id``, seen in 2.11 to 2.14.
    If it goes: AttributeError at every sparse call.
    Instead: nothing public.
    """
    return torch._C._current_graph_task_id()


def next_node_number() -> int:
    """Return the number that autograd gives the next node of this thread.

    API: ``torch._C._autograd._get_sequence_nr``, seen in 2.11 to 2.14.
    If it goes: AttributeError at every sparse call.
    Instead: nothing public.
    """
    return torch._C._autograd._get_sequence_nr()


def current_node_number() -> int | None:
    """Return the number of the node that the backward pass of this thread is at.

    API: ``torch._C._current_autograd_node`` and ``Node._sequence_nr``, seen in 2.11 to 2.14.
    If it goes: AttributeError when a checkpoint is recomputed.
    Instead: nothing public.
    """
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()
