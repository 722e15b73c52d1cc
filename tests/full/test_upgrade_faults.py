# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes wrong while a fleet gets another driver or other models, with clients asking all the time.

The lines are those of tests/sandbox/upgrade_faults.py, each with what must come of it. A line takes about ten minutes:

.venv/bin/pytest -v tests/full/test_upgrade_faults.py -k disk_full
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fleet_testing import Json, sandbox
from upgrade_faults import FAULTS, GONE, HOSTS, KILLED_AT, KILLED_EXPECTED, NEW, OLD, UNTOUCHED, Fault
from upgrade_testing import UpgradeFleet, make

SCENARIO = "upgrade-faults"
NEWER = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.5"


@pytest.fixture(scope="module")
def built() -> Iterator[UpgradeFleet]:
    """Four GPU hosts and two gateways, made once."""
    yield make(SCENARIO, gateways=2, nvidia_driver_branch=OLD)
    sandbox("remove", "--scenario", SCENARIO)


@pytest.fixture
def fleet(built: UpgradeFleet) -> Iterator[UpgradeFleet]:
    """The fleet on the old driver, serving, with nothing on record."""
    built.wait_serving()
    if set(built.branches().values()) != {OLD}:
        built.roll(OLD)
    built.roll(playbook="deploy")
    built.forget()
    yield built
    built.world.reset()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fleet: UpgradeFleet, fault: Fault) -> None:
    print(fault.expected)
    changed = fleet.fleet.changed("gpu01", "llama", image=NEWER)
    try:
        fleet.give(fault.prepare)
        before = {name: host.identity(*host.models()) for name, host in fleet.hosts.items() if host.ready(8000)}
        with fleet.load() as load:
            run, second = fleet.play(fault, NEW, changed)
            assert (run.code == 0) is fault.succeeds, run.output
            for pattern in fault.says:
                assert re.search(pattern, run.output), "not said: %s" % pattern
            if second is not None:
                assert second.code != 0 and re.search(fault.second, second.output)
                assert second.changed() == []
            _ended(fleet, fault, before)
            assert fleet.out() == set(fault.out)
            fleet.give(fault.mend)
            fleet.wait_reachable()
            _again(fleet, fault, changed)
    finally:
        # For the next line, where this one has failed; what is mended already does not mind.
        with contextlib.suppress(AssertionError):
            fleet.give(fault.mend)
    if not fault.lost:
        load.check()


def _ended(fleet: UpgradeFleet, fault: Fault, before: dict[str, Any]) -> None:
    """Every host is where the table says."""
    for name, end in fault.ends.items():
        if end == GONE:
            assert not fleet.hosts[name].succeeds("true"), "%s can be reached" % name
            continue
        branch, outcome = end
        if branch:
            assert fleet.driver(name).startswith(branch + "."), name
        assert fleet.record(name, fault.playbook).get("outcome", "") == outcome, name
        if end == UNTOUCHED:
            # Its services were not even restarted.
            assert fleet.hosts[name].identity() == before[name], name


def _again(fleet: UpgradeFleet, fault: Fault, changed: Json) -> None:
    """The next run ends what the first one could not."""
    if not fault.again:
        return
    if fault.playbook == "deploy":
        fleet.roll(playbook="deploy", inventory=changed)
        assert fleet.record("gpu01", "deploy")["target"].startswith("llama 1.8.5 ")
    else:
        fleet.roll(NEW)
        assert set(fleet.branches().values()) == {NEW}
    assert fleet.out() == set()
    fleet.wait_serving(10)


@pytest.mark.parametrize("step", KILLED_AT)
def test_controller_killed(fleet: UpgradeFleet, step: str) -> None:
    print(KILLED_EXPECTED)
    with fleet.load() as load:
        options = fleet.options("upgrade_drivers", NEW)
        run = fleet.fleet.play_until(lambda: fleet.reached("gpu01", step), "upgrade_drivers", *options)
        assert "PLAY RECAP" not in run.output, "it was over before it was killed"
        fleet.roll(NEW)
        assert set(fleet.branches().values()) == {NEW} and fleet.out() == set()
        assert {name: fleet.record(name)["outcome"] for name in HOSTS} == dict.fromkeys(HOSTS, "updated")
        again = fleet.roll(NEW)
        assert again.changed() == []
    load.check()
