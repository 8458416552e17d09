"""A small dose of the model of the NVMe store; `tools/faults.py model` gives more of it."""

from __future__ import annotations

from hypothesis import settings

from tests.tiers.nvme_machine import StoreMachine

TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
