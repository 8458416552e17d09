"""Gradient accumulation: the order in which the micro-batches of a step run."""
