"""Triton kernels and their launchers, imported only when an operator runs on CUDA."""
