"""A small dose of the model of blocks and held versions; `tools/faults.py model` gives more."""

from __future__ import annotations

from hypothesis import settings

from tests.partition.block_machine import BlockMachine

TestBlocks = BlockMachine.TestCase
TestBlocks.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
