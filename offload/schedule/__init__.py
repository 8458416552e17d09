"""Trace, cost model and plan (all pure), and the executor."""
