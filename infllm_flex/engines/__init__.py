"""Engines that attend to selected blocks: the fused operator and FlexAttention.

`choose.choose_engine` picks one per call. An engine works in two steps: ``build_lists`` makes what
its kernels walk, ``attend`` attends over it.
"""
