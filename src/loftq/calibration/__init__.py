"""Statistics of what every matrix is given, block by block."""
