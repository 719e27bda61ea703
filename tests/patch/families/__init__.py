"""Every causal LM type of transformers, tiny, patched and compared with itself unpatched."""
