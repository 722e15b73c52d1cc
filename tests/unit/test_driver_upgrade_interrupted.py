# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Driver upgrades that are cut off, taken over, or asked for twice."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade_record import (
    RECORD,
    Record,
    read_record,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_record import LEASE, claimed
from fake_host import FakeHost
from upgrade_world import GOALS, KilledError, UpgradeWorld, call, install_fakes, record_of, roll


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> UpgradeWorld:
    made = UpgradeWorld()
    install_fakes(monkeypatch, made)
    return made


# -- two operators --------------------------------------------------------------------------------


def test_the_second_operator_is_told_who_runs(world: UpgradeWorld) -> None:
    call(world, "prestaged", run="alice@ctl1")
    with pytest.raises(
        FleetError, match="alice@ctl1 is at the upgrade of its driver on this host, last seen 0 seconds ago"
    ) as caught:
        call(world, "drained", run="bob@ctl2")
    assert caught.value.reason == "upgrade_running"
    call(world, "drained", run="alice@ctl1")
    # Also where he would have nothing to do but to go on, and in check mode.
    for goal, check_mode in (("prestaged", False), ("drained", False), ("returned", True)):
        with pytest.raises(FleetError, match="alice@ctl1"):
            call(world, goal, run="bob@ctl2", check_mode=check_mode)
    call(world, "ready", run="bob@ctl2", take_over=True)
    assert record_of(world).claim["run"] == "bob@ctl2"
    call(world, "ready", run="bob@ctl2")
    call(world, "returned", run="bob@ctl2")
    assert record_of(world).claim == {}


def test_two_runs_that_go_on_with_what_a_third_has_left(world: UpgradeWorld) -> None:
    call(world, "drained", run="alice@ctl1")
    world.clock += LEASE
    # Nothing is left to do for the look, but that bob is at it is written down; carol is told.
    call(world, "prestaged", run="bob@ctl2")
    assert record_of(world).claim["run"] == "bob@ctl2" and record_of(world).open
    with pytest.raises(FleetError, match="bob@ctl2"):
        call(world, "prestaged", run="carol@ctl3")
    for goal in ("drained", "ready", "returned"):
        call(world, goal, run="bob@ctl2")
    assert world.serves() and world.loaded == "580.95.05"


def test_what_a_run_has_found_that_never_began_counts_for_no_other(world: UpgradeWorld) -> None:
    """Meanwhile somebody has changed the driver, and the downloads are gone."""
    call(world, "prestaged", run="alice@ctl1")
    world.clock += LEASE
    world.packages.clear()
    world.install_driver("580.95.05")
    world.calls.clear()
    call(world, "prestaged", "595", run="bob@ctl2")
    world.packages.clear()
    world.install_driver("555.42.06")
    world.clock += LEASE
    call(world, "prestaged", "595", run="carol@ctl3")
    assert record_of(world).before.version == "555.42.06"
    assert len(world.ran("--download-only .*nvidia-open=595")) == 2
    # In one run that is looked at once.
    call(world, "drained", "595", run="carol@ctl3")
    assert len(world.ran("--download-only .*nvidia-open=595")) == 2


def test_what_was_ready_for_one_run_is_asked_again_by_the_next(world: UpgradeWorld) -> None:
    for goal in ("prestaged", "drained", "ready"):
        call(world, goal, run="alice@ctl1")
    world.clock += LEASE
    world.unit_state["nim-qwen.service"][0] = "failed"
    world.requests.clear()
    for goal in GOALS:
        call(world, goal, run="bob@ctl2")
    assert world.requests == ["llama", "qwen"] and world.serves()


def test_the_last_step_alone_asks_again_too(world: UpgradeWorld) -> None:
    for goal in ("prestaged", "drained", "ready"):
        call(world, goal, run="alice@ctl1")
    world.clock += LEASE
    world.requests.clear()
    call(world, "returned", run="bob@ctl2")
    assert world.requests == ["llama", "qwen"] and record_of(world).outcome == "updated"


def test_a_word_counts_as_long_as_its_run_has_asked_for(world: UpgradeWorld) -> None:
    call(world, "drained", run="alice@ctl1", lease=1800)
    world.clock += 1799
    with pytest.raises(FleetError, match="1799 seconds ago"):
        call(world, "drained", run="bob@ctl2")
    world.clock += 1
    call(world, "drained", run="bob@ctl2")


def test_a_deployment_on_the_same_host_is_not_disturbed(world: UpgradeWorld) -> None:
    path = "/var/lib/gpu_fleet/nim-deploy.json"
    other = {"step": "drained", "outcome": "", "steps": [{"step": "drained"}], "claim": {"run": "bob", "seen": 1e6}}
    world.files[path] = json.dumps(other).encode()
    with pytest.raises(FleetError, match="bob is at a deployment of its models on this host"):
        call(world, "prestaged", run="alice")
    # Who was at it is gone, and has left the host out.
    world.files[path] = json.dumps(dict(other, claim={})).encode()
    for goal in GOALS:
        outcome, answer = call(world, goal, run="alice")
        assert not outcome.changed and "run that again first" in answer["held"]
    world.files[path] = json.dumps(dict(other, claim={}, outcome="updated")).encode()
    assert roll(world)["outcome"] == "updated"


def test_a_broken_record_of_other_work_is_no_free_host(world: UpgradeWorld) -> None:
    path = "/var/lib/gpu_fleet/nim-deploy.json"
    world.files[path] = b"{"
    with pytest.raises(FleetError, match="how far a deployment of its models has come") as caught:
        call(world, "prestaged")
    assert caught.value.reason == "state_unreadable" and world.files[path] == b"{"
    del world.files[path]
    call(world, "drained")
    # What is out of service already must be able to come back.
    world.files[path] = b"{"
    assert roll(world)["outcome"] == "updated"


def test_a_run_without_a_sign_of_life_is_forgotten() -> None:
    record = Record(claim={"run": "alice", "seen": 1000.0})
    assert claimed(record, "alice", 5000.0).claim["seen"] == 5000.0
    assert claimed(record, "bob", 1000.0 + LEASE).claim["run"] == "bob"
    # The clock was set back.
    assert claimed(record, "bob", 1000.0 - LEASE).claim["run"] == "bob"
    with pytest.raises(FleetError):
        claimed(record, "bob", 999.0 + LEASE)


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", "\ufeff{}", '{"workloads": [1]}', '{"before": {"gpus": "8"}}', "\udcff"]
)
def test_a_broken_record_is_reported_and_left(text: str) -> None:
    host = FakeHost({RECORD: text.encode("utf-8", "surrogateescape")})
    with pytest.raises(FleetError) as caught:
        read_record(host)
    assert caught.value.reason == "state_unreadable" and RECORD in caught.value.message


# -- killed anywhere ------------------------------------------------------------------------------


def _kill_everywhere(monkeypatch: pytest.MonkeyPatch, make: t.Callable[[], UpgradeWorld], **more: t.Any) -> int:
    """Kill the run after each of its commands and writes, and let another one go on; the end is always the same."""

    def finish(world: UpgradeWorld) -> str:
        named = {"run": "run %d" % next(world.runs)} if world.runs else {}
        try:
            roll(world, **more, **named)
        except FleetError as error:
            return "%s %s" % (error.reason, error.facts.get("outcome"))
        return "updated"

    world = make()
    install_fakes(monkeypatch, world)
    said = finish(world)
    wanted, total = world.end(), world.steps
    for number in range(1, total + 1):
        world = make()
        install_fakes(monkeypatch, world)
        world.kill_after = number
        with pytest.raises(KilledError):
            finish(world)
        world.kill_after = None
        assert finish(world) == said, "killed after %d" % number
        assert world.end() == wanted, "killed after %d" % number
        found = read_record(world)
        assert found is None or not found.open, "killed after %d" % number
    return total


@pytest.mark.parametrize("old, branch", [("555.42.06", "580"), ("580.95.05", "595"), ("595.45.04", "580")])
def test_killed_anywhere_and_run_again(monkeypatch: pytest.MonkeyPatch, old: str, branch: str) -> None:
    assert _kill_everywhere(monkeypatch, lambda: UpgradeWorld(old), branch=branch) > 30


def test_killed_anywhere_and_gone_on_with_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As playbooks do it: each run has its name."""

    def make() -> UpgradeWorld:
        world = UpgradeWorld()
        world.runs = iter(range(9))
        return world

    assert _kill_everywhere(monkeypatch, make, take_over=True) > 30


def test_killed_anywhere_with_a_reboot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _kill_everywhere(monkeypatch, UpgradeWorld, reboot="always") > 30


@pytest.mark.parametrize("fault", ["nim_fails_on", "broken", "build_fails"])
def test_killed_anywhere_on_the_way_back(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def make() -> UpgradeWorld:
        world = UpgradeWorld()
        setattr(world, fault, "580.95.05" + ("-0ubuntu1" if fault == "broken" else ""))
        return world

    assert _kill_everywhere(monkeypatch, make) > 30
