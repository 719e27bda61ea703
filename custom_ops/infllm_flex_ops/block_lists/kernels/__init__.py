"""Triton kernels that write block lists."""
