"""Triton kernels of the selection operators."""
