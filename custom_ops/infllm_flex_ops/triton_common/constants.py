"""Factors between natural logarithms and those of base 2, in which kernels take exponentials."""

import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
