# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of a bare host: everything, in the order in which it will be done, and nothing is touched."""

from __future__ import annotations

import json
import pathlib

from control import KEY_VALID
from fleet_testing import Fleet, difference

FLEET = Fleet("plan")
HOST = FLEET.host("gpu01")
LOGIN = FLEET.host("login01")


def test_everything_is_planned_and_nothing_is_done(tmp_path: pathlib.Path) -> None:
    before = HOST.snapshot()
    output = tmp_path / "plan.json"
    run = FLEET.play("plan", "-e", "plan_fail_on_drift=true", "-e", "plan_output=%s" % output, succeeds=False)
    assert run.code == 2
    assert difference(before, HOST.snapshot()) == {}
    rows = json.loads(output.read_text())
    assert {row["state"] for row in rows if row["host"] == LOGIN.name} == {"no GPU"}
    mine = [row for row in rows if row["host"] == HOST.name]
    assert {row["state"] for row in mine} == {"change"}
    assert list(dict.fromkeys(row["resource"] for row in mine)) == [
        "nvidia_driver",
        "nvidia_driver_reload",
        "docker_engine",
        "docker_daemon",
        "docker_group",
        "nvidia_container_toolkit",
        "ngc_login",
        "nim_image",
        "nim_service",
    ]
    assert all(row["why"] for row in mine)
    assert {row["disruption"] for row in mine} == {"none"}, "nothing serves yet"
    for secret in (KEY_VALID, "hf_plan-scenario-token"):
        assert secret not in run.output + output.read_text() + json.dumps(run.results)
    assert "Not as wanted, or not known to be: %s." % HOST.name in run.output


def test_drift_alone_is_no_failure() -> None:
    run = FLEET.play("plan", "--limit", HOST.name)
    assert "0 of 1 hosts are as wanted" in run.output
