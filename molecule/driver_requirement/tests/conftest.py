# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finds the sandbox's helpers and shows the host's journal where a test fails."""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "tests/sandbox"))

from fleet_testing import pytest_runtest_makereport

__all__ = ["pytest_runtest_makereport"]
