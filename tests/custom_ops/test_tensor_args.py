"""Arguments grouped in NamedTuples reach a kernel member by member, as Triton launches them."""

import importlib
import pkgutil
from typing import Any, NamedTuple

import pytest
import torch

import infllm_flex_ops
from tests.custom_ops.harness import INTERPRETED

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from benchmarking.ahead_of_time import Launch, compile_kernel  # noqa: E402
from infllm_flex_ops.triton_common.tensor_args import View, view  # noqa: E402


class Sizes(NamedTuple):
    ROWS: int
    DOUBLE: bool


class Pair(NamedTuple):
    first: Any
    count: int


@triton.jit(do_not_specialize=["n"])
def sum_kernel(x, pair, out, n, SIZES: tl.constexpr):
    row = tl.arange(0, SIZES.ROWS)
    x = View(x.ptr + tl.program_id(0) * x.b, x.b, x.h, x.s, x.d)
    total = tl.full([SIZES.ROWS], 0.0, tl.float32)
    for i in tl.range(0, pair.count):
        total += tl.load(x.ptr + row * x.s + i * x.d, mask=row < n, other=0.0)
    if pair.first is not None:
        total += tl.load(pair.first)
    if SIZES.DOUBLE:
        total = total * 2
    tl.store(out + tl.program_id(0) * n + row, total, mask=row < n)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter runs on CPU tensors")
@pytest.mark.parametrize("first", [None, torch.tensor([10.0])], ids=["none", "tensor"])
@pytest.mark.parametrize("double", [False, True])
def test_members_arrive_by_name(first: torch.Tensor | None, double: bool) -> None:
    x = torch.arange(2 * 1 * 5 * 4, dtype=torch.float32).view(2, 1, 5, 4).transpose(2, 3)
    out = torch.empty(2, 4)
    sizes = Sizes(ROWS=8, DOUBLE=double)
    sum_kernel[(2,)](x=view(x), pair=Pair(first, 5), out=out, n=4, SIZES=sizes)
    expected = x[:, 0].sum(-1) + (0 if first is None else 10)
    assert torch.equal(out, expected * (2 if double else 1))


def compiled(x: torch.Tensor, first: torch.Tensor | None, count: int, n: int) -> Any:
    out = torch.empty(2, n, device="meta")
    arguments = {"x": view(x), "pair": Pair(first, count), "out": out, "n": n}
    launch = Launch(sum_kernel, arguments | {"SIZES": Sizes(8, False)}, {"num_warps": 1})
    return compile_kernel(launch, 90)


needs_compiler = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")


@needs_compiler
def test_a_signature_has_the_members_in_order_and_constants_apart() -> None:
    x = torch.empty(2, 3, 5, 16, dtype=torch.bfloat16, device="meta")
    source = compiled(x, None, 5, 16).src
    assert source.signature == {
        "x": ("*bf16", "i32", "i32", "i32", "constexpr"),  # a stride of 1 is a constant
        "pair": ("constexpr", "i32"),
        "out": "*fp32",
        "n": "i32",
        "SIZES": "constexpr",
    }
    assert source.constants[0, 4] == 1
    assert source.constants[1, 0] is None
    divisible = {path for path, attributes in source.attrs.items() if attributes}
    assert divisible == {(0, 0), (0, 1), (0, 2), (0, 3), (2,)}  # neither count nor n


@needs_compiler
def test_integers_of_a_tuple_are_always_specialised_and_others_only_if_they_may_be() -> None:
    x = torch.empty(2, 3, 5, 16, device="meta")
    kernel = compiled(x, None, 5, 7)
    assert compiled(x, None, 5, 16) is kernel  # n may vary
    assert compiled(x, None, 7, 7) is kernel
    assert compiled(x, None, 16, 7) is not kernel  # a multiple of 16, inside a tuple


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels keep no parameters")
def test_what_a_kernel_must_not_specialise_is_a_parameter_of_its_own() -> None:
    kernels = 0
    for module in pkgutil.walk_packages(infllm_flex_ops.__path__, "infllm_flex_ops."):
        for kernel in vars(importlib.import_module(module.name)).values():
            if isinstance(kernel, triton.runtime.JITFunction):
                kernels += 1
                assert set(kernel.do_not_specialize) <= set(kernel.arg_names), kernel
    assert kernels > 30
