"""A small dose of the models of host arena and device tiers; `tools/faults.py model` gives more."""

from __future__ import annotations

import hypothesis

from tests.tiers.memory_machines import AcceleratorMachine, ArenaMachine, DeviceMachine

_DOSE = hypothesis.settings(
    max_examples=20, stateful_step_count=40, deadline=None, derandomize=True, database=None
)

TestArena = ArenaMachine.TestCase
TestArena.settings = _DOSE
TestDevice = DeviceMachine.TestCase
TestDevice.settings = _DOSE
TestAccelerator = AcceleratorMachine.TestCase
TestAccelerator.settings = _DOSE
