"""Triton and Gluon kernels of block attention."""
