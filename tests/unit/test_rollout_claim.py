# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The word of a run on a host that waits for its turn, with a clock that goes past it."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade_record import RECORD, read_record
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_deploy_planner import DeployRecord
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import converge
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_claim import PATHS, RolloutClaim
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_record import RECORDS
from fake_host import FakeHost
from upgrade_world import UpgradeWorld, install_fakes, record_of
from upgrade_world import call as upgrade


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> UpgradeWorld:
    made = UpgradeWorld()
    install_fakes(monkeypatch, made)
    return made


def claim(host: FakeHost, run: str, state: str = "present", kind: str = "driver_upgrade", **options: t.Any) -> bool:
    """Whether something was changed."""
    return converge(host, RolloutClaim(kind=kind, run=run, state=state, **options), check_mode=False).changed


def test_both_kinds_are_known_by_their_records() -> None:
    assert set(PATHS.values()) == set(RECORDS)
    assert (PATHS["driver_upgrade"], PATHS["nim_deploy"]) == (RECORD, DeployRecord.path)


def test_a_host_that_waits_for_hours_is_kept_for_its_run(world: UpgradeWorld) -> None:
    upgrade(world, "prestaged", run="alice", lease=3600)
    before = record_of(world)
    assert not claim(world, "alice")
    for _half_hour in range(8):
        world.clock += 1800
        assert claim(world, "alice") and not claim(world, "alice")
        with pytest.raises(FleetError, match="alice is at the upgrade") as caught:
            upgrade(world, "prestaged", run="bob")
        assert caught.value.reason == "upgrade_running" and "60 minutes after its last sign" in caught.value.message
    # Nothing but the word is another.
    found = record_of(world)
    assert found.claim == {"run": "alice", "seen": world.clock, "lease": 3600}
    assert dict(found.as_dict(), claim={}) == dict(before.as_dict(), claim={})
    world.calls.clear()
    upgrade(world, "drained", run="alice")
    # What was made ready for this run still is.
    assert world.ran("--download-only") == []
    for goal in ("ready", "returned"):
        upgrade(world, goal, run="alice")
    assert world.serves() and record_of(world).claim == {}


def test_a_run_that_is_refused_elsewhere_does_not_stand_in_the_way_of_the_one_that_has_begun(
    world: UpgradeWorld,
) -> None:
    upgrade(world, "prestaged", run="alice", lease=3600)
    world.clock += 3600
    # Bob looks, is refused on another host, and takes his word back; he takes back nobody else's.
    upgrade(world, "prestaged", "595", run="bob", lease=3600)
    with pytest.raises(FleetError, match="bob is at the upgrade of its driver on this host, last seen 0 seconds ago"):
        claim(world, "alice")
    assert claim(world, "bob", "absent") and not claim(world, "bob", "absent") and record_of(world).claim == {}
    assert claim(world, "alice") and not claim(world, "bob", "absent")
    for goal in ("drained", "ready", "returned"):
        upgrade(world, goal, run="alice")
    assert world.serves() and world.loaded == "580.95.05"


def test_a_run_that_waited_too_long_is_told_who_has_begun_and_a_dead_one_is_followed(world: UpgradeWorld) -> None:
    upgrade(world, "prestaged", run="alice", lease=3600)
    world.clock += 3599
    with pytest.raises(FleetError, match="last seen 3599 seconds ago"):
        claim(world, "bob")
    assert claim(world, "bob", take_over=True)
    world.clock += 3600
    assert claim(world, "alice")


def test_work_of_the_other_kind_counts_too(world: UpgradeWorld) -> None:
    upgrade(world, "prestaged", run="alice", lease=3600)
    other = {"step": "planned", "outcome": "", "claim": {"run": "bob", "seen": world.clock + 1, "lease": 3600}}
    world.files[DeployRecord.path] = json.dumps(other).encode()
    world.clock += 1800
    with pytest.raises(FleetError, match="bob is at a deployment of its models on this host"):
        claim(world, "alice")
    assert not claim(world, "alice", "absent", kind="nim_deploy")
    assert claim(world, "bob", "absent", kind="nim_deploy") and claim(world, "alice")


def test_whom_the_look_did_not_wait_for_is_not_waited_for_later(world: UpgradeWorld) -> None:
    """Bob's controller has died, and Alice knows it."""
    other = {"step": "planned", "outcome": "", "claim": {"run": "bob", "seen": world.clock, "lease": 3600}}
    world.files[DeployRecord.path] = json.dumps(other).encode()
    world.clock += 600
    upgrade(world, "prestaged", run="alice", lease=3600, take_over=True)
    world.clock += 1800
    assert claim(world, "alice")


@pytest.mark.parametrize("text", ["{", "[]", "", None])
def test_without_a_record_there_is_nothing_to_keep(text: str | None) -> None:
    host = FakeHost({} if text is None else {RECORD: text})
    before = dict(host.files)
    assert not claim(host, "alice") and not claim(host, "alice", "absent") and host.files == before


def test_a_word_that_is_no_mapping_is_no_word() -> None:
    host = FakeHost({RECORD: '{"claim": "me"}'})
    assert claim(host, "alice")
    record = read_record(host)
    assert record is not None and record.claim["run"] == "alice"


@pytest.mark.parametrize("options, words", [({"run": ""}, "run = ''"), ({"run": "me", "lease": 0}, "lease = 0")])
def test_bad_options(options: dict[str, t.Any], words: str) -> None:
    with pytest.raises(FleetError, match=words) as caught:
        RolloutClaim(kind="driver_upgrade", **options)
    assert caught.value.reason == "invalid_option"
