# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The journals of the hosts, where a test fails; and the table of drifts."""

from __future__ import annotations

from drift_testing import pytest_terminal_summary
from fleet_testing import pytest_runtest_makereport

__all__ = ["pytest_runtest_makereport", "pytest_terminal_summary"]
