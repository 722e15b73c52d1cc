# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan cannot lie: whatever is done to a converged host, the plan names it, `site` mends just that, and then all is well.

.venv/bin/pytest -n 2 tests/full/test_drifts.py            # the whole table
.venv/bin/pytest tests/full/test_drifts.py -k 'a NIM that hangs'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from drift_testing import Patient
from drifts import DRIFTS, VARIABLES, Drift
from fleet_testing import Fleet, sandbox


@pytest.fixture(scope="session")
def patient(worker_id: str) -> Iterator[Patient]:
    """A host of its own for every process of pytest-xdist."""
    scenario = "drifts-" + worker_id
    sandbox("remove", "--scenario", scenario)
    sandbox("add", "gpu01", "--scenario", scenario, "--image", "ubuntu2404", "--gpus", "NVIDIA H200:143771:2")
    fleet = Fleet(scenario, {"gpu_hosts": {"vars": VARIABLES}})
    yield Patient(fleet, fleet.host("gpu01"), {"llama": 8000, "mistral": 8001})
    sandbox("remove", "--scenario", scenario)


@pytest.mark.parametrize("drift", DRIFTS, ids=str)
def test_drift(patient: Patient, drift: Drift, record_property: Callable[[str, object], None]) -> None:
    record_property("drift", drift.name)
    record_property("seconds", patient.suffer(drift))
