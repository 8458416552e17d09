"""A small dose of the model of the pager; `tools/faults.py model` gives more of it."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.engine.pager_machine import PagerMachine

TestPager = pytest.mark.filterwarnings("ignore:.*is made again.*:RuntimeWarning")(
    PagerMachine.TestCase
)
TestPager.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
