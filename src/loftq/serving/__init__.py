"""Ways out: what was trained, as files that other software reads."""
