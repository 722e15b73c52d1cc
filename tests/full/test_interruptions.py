# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A run that is interrupted anywhere is finished by the next one. Each line of the table takes about two minutes.

.venv/bin/pytest -v tests/full
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Iterator

import pytest
from fleet_testing import Fleet, Host, Run, read_inventory, sandbox

#: Task after whose announcement the controller dies, and how many seconds after.
MOMENTS = [
    ("Install the NVIDIA driver", 1),
    ("Install the NVIDIA driver", 4),
    ("Install the NVIDIA driver", 8),
    ("Load the installed driver", 0.5),
    ("Docker Engine is installed and runs", 2),
    ("Docker Engine is installed and runs", 6),
    ("Docker is configured", 0.5),
    ("Exactly these users", 0.3),
    ("Containers can use the GPUs", 2),
    ("Containers can use the GPUs", 6),
    ("Docker is logged in", 0.3),
    ("Images are on the host", 0.5),
    ("Images are on the host", 2),
    ("NIM services are as wanted", 0.5),
    ("NIM services are as wanted", 1.5),
    ("Every model answers", 2),
]
#: The same for a host that loses power.
POWER_CUTS = [
    ("Install the NVIDIA driver", 5),
    ("Docker Engine is installed and runs", 5),
    ("Containers can use the GPUs", 4),
    ("Images are on the host", 1),
    ("Every model answers", 2),
]

OURS = "/etc /usr/local /var/lib/nim /var/lib/gpu_fleet /root"


@pytest.fixture
def fleet(worker_id: str) -> Iterator[Fleet]:
    """A bare host; another one for every process of pytest-xdist."""
    scenario = "interrupted-" + worker_id
    sandbox("remove", "--scenario", scenario)
    sandbox("add", "gpu01", "--scenario", scenario, "--image", "debian13", "--gpus", "NVIDIA H200:143771:1")
    yield Fleet(scenario, read_inventory(Path(__file__).with_name("inventory.yml")))
    sandbox("remove", "--scenario", scenario)


@pytest.fixture
def host(fleet: Fleet) -> Host:
    return fleet.host("gpu01")


def _moment(task: str) -> str:
    return r"TASK \[.*%s" % re.escape(task)


def _is_finished(fleet: Fleet, host: Host, first: Run) -> None:
    assert "PLAY RECAP" not in first.output, "it was over before it was interrupted"
    # No second attempt: the very next run must do it.
    fleet.site()
    assert fleet.site().changed() == []
    # Nothing half-written: no file that was to be moved to its place, no half-installed package, no broken JSON.
    temporary = host.run(r"find %s -regextype posix-extended -regex '.*/\.[^/]+\.[a-z0-9_]{8}'" % OURS)
    assert temporary == ""
    assert host.run("dpkg --audit") == ""
    for path in host.run("ls /etc/nim/*.json /etc/docker/daemon.json /var/lib/gpu_fleet/*.json").split():
        json.loads(host.run("cat " + path))
    assert "200" in host.run("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8000/v1/health/ready")


@pytest.mark.parametrize(("task", "seconds"), MOMENTS)
def test_controller_dies(fleet: Fleet, host: Host, task: str, seconds: float) -> None:
    _is_finished(fleet, host, fleet.play_until(_moment(task), "site", after=seconds))


@pytest.mark.parametrize(("task", "seconds"), POWER_CUTS)
def test_host_loses_power(fleet: Fleet, host: Host, task: str, seconds: float) -> None:
    run = fleet.play_until(_moment(task), "site", after=seconds)
    sandbox("stop", host.name, "--power-cut")
    sandbox("start", host.name)
    _is_finished(fleet, host, run)
