# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``could not select device driver "" with capabilities: [[gpu]]``: Docker's own words, and the run after which it does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from fleet_testing import Fleet

FLEET = Fleet("diagnose")
HOST = FLEET.host("gpu01")
OPTIONS = ["-e", "database_password=of-no-interest-here"]
HOOK = "/usr/bin/nvidia-container-runtime-hook"


def without_toolkit() -> None:
    HOST.run(
        "DEBIAN_FRONTEND=noninteractive apt-get purge -qq -y --allow-change-held-packages 'nvidia-container-toolkit*'"
    )
    HOST.restart_docker()


def daemon_older_than_the_toolkit() -> None:
    """As after an installation of the toolkit under a Docker that runs."""
    HOST.run("mv %s /root/hook" % HOOK)
    HOST.restart_docker()
    time.sleep(4)
    HOST.run("mv /root/hook %s" % HOOK)


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (without_toolkit, "package nvidia-container-toolkit"),
        (daemon_older_than_the_toolkit, "GPU driver of the running daemon"),
    ],
)
def test_could_not_select_device_driver(break_it: Callable[[], None], named: str) -> None:
    FLEET.site(*OPTIONS)
    image = HOST.run("docker inspect --format '{{.Image}}' nim-llama")
    container = "docker run --rm --gpus all --entrypoint nvidia-smi %s -L 2>&1" % image
    assert "GPU 1" in HOST.run(container)
    before = HOST.identity()
    break_it()
    said = HOST.run(container, check=False)
    assert 'could not select device driver "" with capabilities: [[gpu]]' in said, said
    with HOST.client(8000) as client:
        run = FLEET.site(*OPTIONS)
    assert named in json.dumps(run.changes(HOST.name))
    assert "GPU 1" in HOST.run(container)
    assert run.restarts(HOST.name) == set()
    assert {name: who.serving for name, who in HOST.identity().items()} == {
        name: who.serving for name, who in before.items()
    }
    assert client.outage < 2
    assert FLEET.site(*OPTIONS).changed() == []
