"""Triton kernels that select blocks for a decode step."""
