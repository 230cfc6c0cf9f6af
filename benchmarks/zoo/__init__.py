"""Tiny models of every model type of transformers, and the way through ``loftq`` that each is taken."""
