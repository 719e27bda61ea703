"""Triton kernels that select blocks for whole sequences."""
