# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""After check mode on the bare host; and what the operator meets on a host with nothing but a fresh Docker."""

from __future__ import annotations

from story import Story, difference, snapshot

HOST = "default-gpu01"


def test_check_mode_changed_nothing(story: Story, bare: dict[str, str]) -> None:
    assert difference(bare, snapshot(story, HOST)) == {}


def test_fresh_docker_refuses_the_operator(story: Story) -> None:
    # The role alone, with its defaults: the group is left as Docker's package makes it.
    run = story.play(str(story.directory / "role.yml"), "-e", "role=docker", variables=False)
    assert run.recap(HOST)["changed"] >= 1
    assert story.ssh(HOST, "docker ps --quiet") == ""
    answer = story.ssh(HOST, "runuser -u ops -- docker ps 2>&1; true")
    assert "permission denied" in answer.lower(), answer
