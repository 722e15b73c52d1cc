# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan cannot lie: whatever is done to a converged host, the plan names it, `site` mends just that, and once more nothing.

.venv/bin/pytest -n 2 tests/full/test_drifts.py            # the whole table
.venv/bin/pytest tests/full/test_drifts.py -k 'a NIM that hangs'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from drift_testing import Patient
from drifts import DRIFTS, FABRIC, VARIABLES, Drift
from fleet_testing import Fleet, sandbox


def _converged(scenario: str, *hardware: str) -> Iterator[Patient]:
    sandbox("remove", "--scenario", scenario)
    gpus = ("--gpus", "NVIDIA H200:143771:2", *hardware)
    sandbox("add", "gpu01", "--scenario", scenario, "--image", "ubuntu2404", *gpus)
    fleet = Fleet(scenario, {"gpu_hosts": {"vars": VARIABLES}})
    yield Patient(fleet, fleet.host("gpu01"), {"llama": 8000, "mistral": 8001})
    sandbox("remove", "--scenario", scenario)


@pytest.fixture(scope="session")
def patient(worker_id: str) -> Iterator[Patient]:
    """A host of its own for every process of pytest-xdist."""
    yield from _converged("drifts-" + worker_id)


@pytest.fixture(scope="module")
def patient_with_fabric(worker_id: str) -> Iterator[Patient]:
    yield from _converged("drifts-fabric-" + worker_id, "--hardware", "fabric=true")


@pytest.mark.parametrize("drift", DRIFTS, ids=str)
def test_drift(patient: Patient, drift: Drift, record_property: Callable[[str, object], None]) -> None:
    record_property("drift", drift.name)
    record_property("seconds", patient.suffer(drift))


@pytest.mark.parametrize("drift", FABRIC, ids=str)
def test_drift_of_the_fabric(
    patient_with_fabric: Patient, drift: Drift, record_property: Callable[[str, object], None]
) -> None:
    record_property("drift", drift.name)
    record_property("seconds", patient_with_fabric.suffer(drift))
