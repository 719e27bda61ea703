"""Stage 2: lists of the blocks that a tile of queries loads."""
