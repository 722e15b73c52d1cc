# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Running again, whole or in parts, changes nothing; a user taken off the list loses Docker and nothing else happens."""

from __future__ import annotations

from typing import Iterator

import pytest
from story import Run, Story, difference, snapshot

HOST = "default-gpu01"
SITE = "gpu_fleet.nim.site"
#: Written anew by programs that run, not by a playbook.
ALIVE = ("/var/lib/docker", "/var/lib/containerd", "/var/lib/nim/cache", "/var/cache")


def _nothing(run: Run) -> None:
    recap = run.recap(HOST)
    assert (recap["changed"], recap["failed"], recap["unreachable"]) == (0, 0, 0), run.output


@pytest.fixture(autouse=True)
def container_stays(story: Story) -> Iterator[None]:
    """Nothing here may restart the model."""
    command = "docker inspect --format '{{.Id}} {{.State.StartedAt}}' nim-llama; systemctl show -p MainPID nim-llama"
    before = story.ssh(HOST, command)
    yield
    assert story.ssh(HOST, command) == before


def test_check_mode_finds_nothing(story: Story) -> None:
    before = snapshot(story, HOST, ALIVE)
    run = story.play(SITE, "--check", "--diff", "--limit", HOST)
    _nothing(run)
    assert "+++" not in run.output
    assert difference(before, snapshot(story, HOST, ALIVE)) == {}


@pytest.mark.parametrize("role", ["nvidia_driver", "docker", "nvidia_container_toolkit", "ngc", "nim"])
def test_every_role_alone(story: Story, role: str) -> None:
    _nothing(story.play(str(story.directory / "role.yml"), "-e", "role=" + role))


def test_one_tag(story: Story) -> None:
    run = story.play(SITE, "--tags", "nim")
    _nothing(run)
    assert "TASK [gpu_fleet.nim.nim : " in run.output
    # Ansible checks the arguments of every role whatever the tags are.
    assert "Docker Engine is installed" not in run.output and "Install the NVIDIA driver" not in run.output


def test_limit_to_nobody_touches_nobody(story: Story) -> None:
    run = story.play(SITE, "--limit", "gpu_hosts:!" + HOST, check=False)
    assert HOST not in run.output


def test_user_taken_off_the_list(story: Story) -> None:
    try:
        run = story.play(SITE, "--tags", "docker", "--diff", "-e", '{"docker_users": []}')
        assert run.recap(HOST)["changed"] == 1
        assert "-member ops" in run.output
        assert story.ssh(HOST, "getent group docker").strip().endswith(":")
        answer = story.ssh(HOST, "runuser -u ops -- docker ps 2>&1; true")
        assert "permission denied" in answer.lower(), answer
    finally:
        run = story.play(SITE, "--tags", "docker")
    assert run.recap(HOST)["changed"] == 1
    assert "nim-llama" in story.ssh(HOST, "runuser -u ops -- docker ps")
