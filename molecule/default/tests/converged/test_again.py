# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Running again, whole or in parts, changes nothing; every role mends what is its own, with or without the others.

A user taken off the list loses Docker and nothing else happens.
"""

from __future__ import annotations

from typing import Iterator

import pytest
from fleet_testing import CHECKOUT, Fleet, difference

FLEET = Fleet("default")
HOST = FLEET.host("gpu01")
#: Written anew by programs that run, not by a playbook.
ALIVE = ("/var/lib/docker", "/var/lib/containerd", "/var/lib/nim/cache", "/var/cache")


@pytest.fixture(autouse=True)
def container_stays() -> Iterator[None]:
    """Nothing here may restart the model."""
    command = "docker inspect --format '{{.Id}} {{.State.StartedAt}}' nim-llama; systemctl show -p MainPID nim-llama"
    before = HOST.run(command)
    yield
    assert HOST.run(command) == before


def test_check_mode_finds_nothing() -> None:
    before = HOST.snapshot(ALIVE)
    run = FLEET.site("--check", "--diff", "--limit", HOST.name)
    assert run.changed() == []
    assert "+++" not in run.output
    assert difference(before, HOST.snapshot(ALIVE)) == {}


#: Role -> what breaks something small that no other role mends, and a command that succeeds where it is whole.
ALONE = {
    "nvidia_driver": ("apt-mark unhold libnvidia-compute-580", "apt-mark showhold | grep -x libnvidia-compute-580"),
    "docker": ("apt-mark unhold docker-ce", "apt-mark showhold | grep -x docker-ce"),
    "nvidia_container_toolkit": (
        "apt-mark unhold libnvidia-container1",
        "apt-mark showhold | grep -x libnvidia-container1",
    ),
    "ngc": ("rm /root/.docker/config.json", "grep nvcr.io /root/.docker/config.json"),
    "nim": ("systemctl disable nim-llama", "systemctl is-enabled nim-llama"),
}


@pytest.mark.parametrize("role", ALONE)
def test_every_role_alone(role: str) -> None:
    breaks, is_whole = ALONE[role]
    HOST.run(breaks)
    assert not HOST.succeeds(is_whole)
    playbook = CHECKOUT / "molecule/default/role.yml"
    assert len(FLEET.play(playbook, "-e", "role=" + role).changed()) == 1
    assert HOST.succeeds(is_whole)
    assert FLEET.play(playbook, "-e", "role=" + role).changed() == []


def test_one_tag() -> None:
    # Something to do for the role, and for another one; a host that is as wanted would leave at once.
    HOST.run("echo '# by hand' >> /etc/systemd/system/nim.slice; gpasswd --delete ops docker")
    run = FLEET.nim()
    assert [change["what"] for change in run.changes(HOST.name)] == ["/etc/systemd/system/nim.slice", "systemd"]
    # Ansible checks the arguments of every role whatever the tags are.
    assert "Docker Engine is installed" not in run.output and "Install the NVIDIA driver" not in run.output
    assert [change["what"] for change in FLEET.site().changes(HOST.name)] == ["member ops"]


def test_limit_to_nobody_touches_nobody() -> None:
    run = FLEET.site("--limit", "gpu_hosts:!" + HOST.name, succeeds=False)
    assert "no hosts to target" in run.output
    assert HOST.name not in run.output and run.results == []


def test_user_taken_off_the_list() -> None:
    try:
        run = FLEET.site("--tags", "docker", "--diff", "-e", '{"docker_users": []}')
        assert len(run.changed()) == 1
        assert "-member ops" in run.output
        assert HOST.run("getent group docker").endswith(":")
        answer = HOST.run("runuser -u ops -- docker ps 2>&1; true")
        assert "permission denied" in answer.lower(), answer
    finally:
        run = FLEET.site("--tags", "docker")
    assert len(run.changed()) == 1
    assert "nim-llama" in HOST.run("runuser -u ops -- docker ps")
