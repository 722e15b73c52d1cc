# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Other drivers and other models on four hosts that serve, while clients keep asking. The tests build on each other, in this order."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest
from fleet_testing import Fleet, Run
from load import Load
from upgrade_faults import HOSTS
from upgrade_testing import UpgradeFleet

FLEET = UpgradeFleet(Fleet("upgrade"))
full = pytest.mark.skipif(not os.environ.get("TEST_FULL"), reason="a part of `make test-full`; TEST_FULL=1")
NEWER = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.5"


@pytest.fixture
def clients() -> Iterator[Load]:
    """They ask all the time and get every answer, whole."""
    with FLEET.load() as load:
        yield load
    print(load.as_dict())
    load.check()


def everywhere(value: str) -> dict[str, str]:
    return dict.fromkeys(HOSTS, value)


def upgraded(run: Run, branch: str) -> None:
    """Every host has the driver and serves, and a second run finds nothing to do."""
    assert "4 updated." in run.output
    assert FLEET.branches() == everywhere(branch) and FLEET.out() == set()
    assert {name: FLEET.record(name)["outcome"] for name in HOSTS} == everywhere("updated")
    FLEET.wait_serving(5)
    before = FLEET.identities()
    again = FLEET.roll(branch)
    assert again.changed() == [] and FLEET.identities() == before


def test_check_mode_tells_the_plan_and_changes_nothing() -> None:
    before = FLEET.identities()
    run = FLEET.roll("580", "--check")
    first, *others = (FLEET.hosts[name].name for name in HOSTS)
    assert "Batch 1 (canary): %s." % first in run.output
    assert "Batch 2: %s, %s." % (others[0], others[1]) in run.output and "Batch 3: %s." % others[2] in run.output
    assert (
        "ready: large 2 of 2, llama 1 of 2" in run.output
        and "Ready replicas of every model at each moment:" in run.output
    )
    assert FLEET.branches() == everywhere("570") and FLEET.identities() == before
    assert not any(FLEET.record(name) for name in HOSTS)


def test_570_to_580(clients: Load, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.html"
    boots = {name: host.boot_id() for name, host in FLEET.hosts.items()}
    run = FLEET.roll("580", variables={"driver_upgrade_report": str(page)})
    upgraded(run, "580")
    assert {name: host.boot_id() for name, host in FLEET.hosts.items()} == boots
    assert "Requests at the gateways during the run" in run.output and "of them 0 failed" in run.output
    assert all(FLEET.hosts[name].name in page.read_text() for name in HOSTS)
    assert all(host.succeeds("systemctl is-active nvidia-persistenced") for host in FLEET.hosts.values())


@full
def test_580_to_595_and_names_without_a_branch(clients: Load) -> None:
    upgraded(FLEET.roll("595"), "595")


@full
def test_595_back_to_580(clients: Load) -> None:
    upgraded(FLEET.roll("580"), "580")


@full
def test_535_to_580_with_a_reboot(clients: Load) -> None:
    FLEET.roll("535")
    assert FLEET.branches() == everywhere("535")
    boots = {name: host.boot_id() for name, host in FLEET.hosts.items()}
    upgraded(FLEET.roll("580", variables={"driver_upgrade_reboot": "always"}), "580")
    assert not set(boots.values()) & {host.boot_id() for host in FLEET.hosts.values()}


def images() -> dict[str, str]:
    """Digest that each host runs, by its own word."""
    found = {}
    for name, host in FLEET.hosts.items():
        (model,) = host.models()
        found[name] = host.run("docker inspect --format '{{.Image}}' nim-" + model)
    return found


def test_another_version_of_one_model(clients: Load) -> None:
    before, others = images(), {name: FLEET.hosts[name].identity() for name in HOSTS[2:]}
    wanted = FLEET.fleet.changed("gpu01", "llama", image=NEWER)
    run = FLEET.roll(playbook="deploy", inventory=wanted)
    assert "2 updated." in run.output and FLEET.out() == set()
    after = images()
    assert [after[name] != before[name] for name in HOSTS] == [True, True, False, False]
    # Those of the other model were neither drained nor restarted.
    assert {name: FLEET.hosts[name].identity() for name in HOSTS[2:]} == others
    assert [bool(FLEET.record(name, "deploy").get("steps")) for name in HOSTS] == [True, True, False, False]
    again = FLEET.roll(playbook="deploy", inventory=wanted)
    assert again.changed() == [] and images() == after
    # Every image was there before the first host was taken out.
    pulls = [entry["at"] for entry in run.results if "Images are on the host" in entry["task"]]
    drains = [entry["began"] for entry in run.results if "The gateways have it so" in entry["task"]]
    assert pulls and drains and max(pulls) < min(drains)


def test_a_model_that_does_not_become_ready_gets_back_its_digest(clients: Load) -> None:
    before, second = images(), FLEET.hosts["gpu02"].identity()
    # Back to the old tag, which is another image, and which says that its engine is out of memory.
    sick = FLEET.fleet.changed(
        "gpu01",
        "llama",
        image=NEWER.replace("1.8.5", "1.8.4"),
        environment={"STANDIN_FAIL": "eng-25"},
    )
    run = FLEET.roll(playbook="deploy", inventory=sick, succeeds=False)
    assert "What ran before (llama 1.8.5) was put back and answers." in run.output
    assert "The run stops after 1 of 2 hosts" in run.output
    assert images() == before and FLEET.hosts["gpu02"].identity() == second
    assert FLEET.record("gpu01", "deploy")["outcome"] == "rolled_back" and FLEET.out() == set()
    assert not FLEET.hosts["gpu01"].succeeds("test -e /var/lib/gpu_fleet/nim-deploy.before")


@full
def test_a_controller_that_dies_in_a_deployment(clients: Load) -> None:
    def changed() -> bool:
        record = FLEET.record("gpu01", "deploy")
        # The record of the one before has an outcome.
        return record.get("step") == "changed" and not record.get("outcome")

    FLEET.fleet.play_until(changed, "deploy", *FLEET.options("deploy"), inventory=FLEET.fleet.inventory)
    run = FLEET.roll(playbook="deploy")
    assert "left by an earlier run" in run.output and FLEET.out() == set()
    records = [FLEET.record(name, "deploy") for name in HOSTS[:2]]
    assert [(record["target"], record["outcome"]) for record in records] == [("llama 1.8.4", "updated")] * 2
