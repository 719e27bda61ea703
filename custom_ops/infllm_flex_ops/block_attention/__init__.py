"""Stage 3: attention over selected blocks, forward, backward and decoding."""
