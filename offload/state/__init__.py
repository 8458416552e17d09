"""Deferred initialization, streaming load, export and checkpoints."""
