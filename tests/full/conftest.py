# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The journals of the hosts, where a test fails."""

from __future__ import annotations

from fleet_testing import pytest_runtest_makereport

__all__ = ["pytest_runtest_makereport"]
