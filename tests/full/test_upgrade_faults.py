# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes wrong while a fleet gets another driver or other models, with clients asking all the time.

The lines are those of tests/sandbox/upgrade_faults.py, each with what must come of it. A line takes two to four minutes:

.venv/bin/pytest -v tests/full/test_upgrade_faults.py -k disk_full
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fleet_sandbox.inventory import full_name
from fleet_testing import sandbox
from upgrade_faults import BRANCHES, FAULTS, GONE, HOSTS, KILLED_AT, KILLED_EXPECTED, Fault, directed
from upgrade_testing import UpgradeFleet, make

SCENARIO = "upgrade-faults"
NEWER = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.5"


@pytest.fixture(scope="module")
def built() -> Iterator[UpgradeFleet]:
    """Four GPU hosts and two gateways, made once."""
    yield make(SCENARIO, gateways=2, nvidia_driver_branch=BRANCHES[0])
    sandbox("remove", "--scenario", SCENARIO)


@pytest.fixture
def fleet(built: UpgradeFleet) -> Iterator[UpgradeFleet]:
    """The fleet, serving the models of its inventory, with nothing on record."""
    built.wait_serving()
    if any(built.record(name, "deploy") for name in HOSTS):
        built.roll(playbook="deploy")
    built.forget()
    yield built
    built.world.reset()


def direction(fleet: UpgradeFleet, towards: str = "") -> tuple[str, str]:
    """Branch of the driver that all hosts have, and the other one; both are branches of the table.

    Args:
        towards: What the other one must be; empty for any.
    """
    branches = set(fleet.branches().values())
    if len(branches) != 1 or not branches < set(BRANCHES) or towards in branches:
        fleet.roll(next(branch for branch in BRANCHES if branch != towards))
        fleet.forget()
    (old,) = set(fleet.branches().values())
    (new,) = set(BRANCHES) - {old}
    return old, new


@pytest.mark.parametrize("line", FAULTS, ids=lambda fault: fault.name)
def test_fault(fleet: UpgradeFleet, line: Fault) -> None:
    print(line.expected)
    old, new = direction(fleet, line.towards)
    fault = directed(line, old, new)
    changed = fleet.fleet.changed("gpu01", "llama", image=NEWER)
    # Clients of every gateway, but for the one that is stopped under them.
    stopped = {full_name(SCENARIO, str(order.options[0])) for order in fault.during if order.what == "stop"}
    asked = [gateway for gateway in fleet.gateways if gateway.name not in stopped]
    for gateway in asked:
        fleet.wait_answering(gateway)
    loads = [fleet.load(gateway) for gateway in asked]
    try:
        fleet.give(fault.prepare)
        before = {name: host.identity(*host.models()) for name, host in fleet.hosts.items() if host.ready(8000)}
        with contextlib.ExitStack() as clients:
            for load in loads:
                clients.enter_context(load)
            run, second = fleet.play(fault, new, changed)
            assert (run.code == 0) is fault.succeeds, run.output
            for pattern in fault.says:
                assert re.search(pattern, run.output), "not said: %s" % pattern
            if second is not None:
                assert second.code != 0 and re.search(fault.second, second.output)
                assert second.changed() == []
            _ended(fleet, fault, (old, ""), before)
            assert fleet.out() == set(fault.out)
            fleet.give(fault.mend)
            fleet.wait_reachable()
            if fault.again:
                _again(fleet, new)
    finally:
        # For the next line, where this one has failed; what is mended already does not mind.
        with contextlib.suppress(AssertionError):
            fleet.give(fault.mend)
    for load in loads:
        print(load.url, load.as_dict())
        if not fault.lost:
            load.check(least=5)


def _ended(fleet: UpgradeFleet, fault: Fault, untouched: tuple[str, str], before: dict[str, Any]) -> None:
    """Every host is where the table says."""
    for name, end in fault.ends.items():
        branch, outcome = end
        if outcome == GONE[1]:
            assert not fleet.hosts[name].succeeds("true"), "%s can be reached" % name
            continue
        if branch:
            assert fleet.driver(name).startswith(branch + "."), name
        assert fleet.record(name, fault.playbook).get("outcome", "") == outcome, name
        if end == untouched:
            # Its services were not even restarted.
            assert fleet.hosts[name].identity() == before[name], name


def _again(fleet: UpgradeFleet, new: str) -> None:
    """The next run ends what the first one could not."""
    fleet.roll(new)
    assert set(fleet.branches().values()) == {new}
    assert fleet.out() == set()
    fleet.wait_serving(10)


def test_controller_killed_at_every_step(fleet: UpgradeFleet) -> None:
    """One after the other: each run goes on where the one before was killed."""
    print(KILLED_EXPECTED)
    killed: dict[str, str] = {}
    with fleet.load() as load:
        # A step of a moment may be over when it is seen: it has another chance in the next upgrade.
        for _turn in range(4):
            _old, new = direction(fleet)
            fleet.forget()
            for step in [step for step in KILLED_AT if step not in killed]:
                if fleet.reached("gpu01", step, new):
                    continue
                moment = functools.partial(fleet.reached, "gpu01", step, new)
                run = fleet.fleet.play_until(moment, "upgrade_drivers", *fleet.options("upgrade_drivers", new))
                assert "PLAY RECAP" not in run.output, "it was over before it was killed"
                killed.setdefault(fleet.record("gpu01")["step"], run.output[-300:])
            fleet.roll(new)
            assert set(fleet.branches().values()) == {new} and fleet.out() == set()
            assert {name: fleet.record(name)["outcome"] for name in HOSTS} == dict.fromkeys(HOSTS, "updated")
            assert fleet.roll(new).changed() == []
            if set(KILLED_AT) <= set(killed):
                break
    print(load.as_dict())
    assert set(killed) == set(KILLED_AT), "never killed at %s" % sorted(set(KILLED_AT) - set(killed))
    load.check()
