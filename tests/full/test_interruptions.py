# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A run that is interrupted anywhere is finished by the next one. Each line of the table takes about two minutes.

PYTHONPATH=tests/sandbox:tests/sandbox/world .venv/bin/pytest tests/full
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Iterator

import pytest
from control import KEY_VALID
from story import Run, Story, sandbox

HOST = "interrupted-gpu01"
SITE = "gpu_fleet.nim.site"

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
def story() -> Iterator[Story]:
    sandbox("remove", "--scenario", "interrupted")
    sandbox("add", "gpu01", "--scenario", "interrupted", "--image", "debian13", "--gpus", "NVIDIA H200:143771:1")
    yield Story("interrupted", Path(__file__).parent)
    sandbox("remove", "--scenario", "interrupted")


def _moment(task: str) -> str:
    return r"TASK \[.*%s" % re.escape(task)


def _is_finished(story: Story, first: Run) -> None:
    environment = {"NGC_API_KEY": KEY_VALID}
    assert "PLAY RECAP" not in first.output, "it was over before it was interrupted"
    # No second attempt: the very next run must do it.
    story.play(SITE, environment=environment)
    again = story.play(SITE, environment=environment)
    assert again.recap(HOST)["changed"] == 0, again.output
    # Nothing half-written: no file that was to be moved to its place, no half-installed package, no broken JSON.
    temporary = story.ssh(HOST, r"find %s -regextype posix-extended -regex '.*/\.[^/]+\.[a-z0-9_]{8}'" % OURS)
    assert temporary == ""
    assert story.ssh(HOST, "dpkg --audit") == ""
    for path in story.ssh(HOST, "ls /etc/nim/*.json /etc/docker/daemon.json /var/lib/gpu_fleet/*.json").split():
        json.loads(story.ssh(HOST, "cat " + path))
    assert "200" in story.ssh(HOST, "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8000/v1/health/ready")


@pytest.mark.parametrize(("task", "seconds"), MOMENTS)
def test_controller_dies(story: Story, task: str, seconds: float) -> None:
    environment = {"NGC_API_KEY": KEY_VALID}
    _is_finished(story, story.play_until(_moment(task), SITE, after=seconds, environment=environment))


@pytest.mark.parametrize(("task", "seconds"), POWER_CUTS)
def test_host_loses_power(story: Story, task: str, seconds: float) -> None:
    environment = {"NGC_API_KEY": KEY_VALID}
    run = story.play_until(_moment(task), SITE, after=seconds, environment=environment)
    sandbox("stop", HOST, "--power-cut")
    sandbox("start", HOST)
    _is_finished(story, run)
