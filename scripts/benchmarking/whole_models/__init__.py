"""Whole models: prefill, decoding and training steps, dense and patched in turns."""
