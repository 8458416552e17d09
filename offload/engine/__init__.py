"""Faults, hooks, gradients and the engine itself."""
