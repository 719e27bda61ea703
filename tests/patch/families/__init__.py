"""Every causal LM type of transformers, tiny, patched and held against itself unpatched."""
