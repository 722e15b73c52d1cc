# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan cannot lie: some lines of the table that tests/full/test_drifts.py tries whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from drift_testing import Patient
from drifts import DRIFTS, Drift
from fleet_testing import Fleet

FLEET = Fleet("plan")


@pytest.fixture(scope="module")
def patient() -> Patient:
    return Patient(FLEET, FLEET.host("gpu01"), {"llama": 8000})


@pytest.mark.parametrize("drift", [drift for drift in DRIFTS if drift.first], ids=str)
def test_drift(patient: Patient, drift: Drift, record_property: Callable[[str, object], None]) -> None:
    record_property("drift", drift.name)
    patient.suffer(drift)
