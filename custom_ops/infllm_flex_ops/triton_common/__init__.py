"""Triton code that kernels of several stages share."""
