"""Stage 1: which blocks of keys each query token attends to."""
