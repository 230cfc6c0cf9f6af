"""Statistics of the inputs of every matrix, block by block."""
