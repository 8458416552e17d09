"""The parts of tools/faults.py: one module each, see `fault.result` for what a part is."""
