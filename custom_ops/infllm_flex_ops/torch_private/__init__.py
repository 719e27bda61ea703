"""Every private or unstable API of PyTorch that infllm_flex uses, one function each.

Each docstring says what the API is for, in which versions of PyTorch it was seen, what happens
when it goes, and the public way out if there is one. ``tests/test_private_apis.py`` has a test for
each; ``scripts/test_private_apis`` runs them with another version of PyTorch. Nothing else in the
package may use an underscored name of PyTorch.
"""

from infllm_flex_ops.torch_private.autograd import (
    current_backward,
    current_node_number,
    next_node_number,
)
from infllm_flex_ops.torch_private.compilers import (
    constant_to_graphs,
    is_compiled,
    is_traced_otherwise,
    mark_static_address,
    recompile_limit,
    without_side_effect_check,
)
from infllm_flex_ops.torch_private.flex import NO_LISTS, block_mask, flex_options
from infllm_flex_ops.torch_private.modules import (
    code_that_calls,
    forward_hooks,
    forward_pre_hooks,
    is_being_called,
    remove_forward_hooks,
    remove_forward_pre_hooks,
    replace_child,
)
from infllm_flex_ops.torch_private.operators import (
    are_transforms_active,
    assert_async,
    below_autograd,
    forward_mode_enabled,
    single_level_function,
    single_level_functions_allowed,
)
from infllm_flex_ops.torch_private.tensors import (
    is_fake,
    memory_users,
    parse_to,
    tree_map,
    write_count,
)

__all__ = [
    "NO_LISTS",
    "are_transforms_active",
    "assert_async",
    "below_autograd",
    "block_mask",
    "code_that_calls",
    "constant_to_graphs",
    "current_backward",
    "current_node_number",
    "flex_options",
    "forward_hooks",
    "forward_mode_enabled",
    "forward_pre_hooks",
    "is_being_called",
    "is_compiled",
    "is_fake",
    "is_traced_otherwise",
    "mark_static_address",
    "memory_users",
    "next_node_number",
    "parse_to",
    "recompile_limit",
    "remove_forward_hooks",
    "remove_forward_pre_hooks",
    "replace_child",
    "single_level_function",
    "single_level_functions_allowed",
    "tree_map",
    "without_side_effect_check",
    "write_count",
]
