# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check mode on the bare host; and what the operator meets on a host with nothing but a fresh Docker."""

from __future__ import annotations

import json
import os
import pathlib

from fleet_testing import CHECKOUT, Fleet, difference

FLEET = Fleet("default")
HOST = FLEET.host("gpu01")


def test_check_mode_changes_nothing() -> None:
    bare = HOST.snapshot()
    # What the removal at the end is compared with.
    (pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "bare.json").write_text(json.dumps(bare))
    run = FLEET.site("--check", "--diff")
    assert len(run.changed()) > 3, "it says what it would do"
    assert difference(bare, HOST.snapshot()) == {}


def test_fresh_docker_refuses_the_operator() -> None:
    # The role alone, with its defaults: the group is left as Docker's package makes it.
    run = FLEET.play(CHECKOUT / "molecule/default/role.yml", "-e", "role=docker", inventory={"gpu_hosts": {}})
    assert run.changed()
    assert HOST.run("docker ps --quiet") == ""
    answer = HOST.run("runuser -u ops -- docker ps 2>&1; true")
    assert "permission denied" in answer.lower(), answer
