"""``python -m loftq``."""

from loftq.cli import main

main()
