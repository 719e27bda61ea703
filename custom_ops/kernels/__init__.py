"""Triton kernels and their launchers, which are imported only when an operator runs on CUDA."""
