# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every failure that the collection knows, on one host: reason, identifier, cause, remedy, and how soon.

Five seconds at most from the line that decides. Where there is none the time runs from the order, and failure_table says why two
of those are given more.

.venv/bin/pytest -v tests/full/test_failure_signatures.py
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import control
import pytest
from failure_runner import Seen, Theatre, batches, problems, report
from failure_table import IN_CONTAINER, LAST, ON_HOST, REFUSALS, SITUATIONS, WITH_KEY, Refusal, Situation
from fleet_testing import SOURCE, Fleet, sandbox

SCENARIO = "signatures"
LLAMA = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
REGISTRY = SOURCE / "failure_registry.yml"
#: PCI addresses that no other host has: what the kernel says of a GPU is heard on every host of this machine.
ADDRESSES = (
    'import json; p = "/etc/sandbox/hardware.json"; d = json.load(open(p));'
    ' [g.update(bdf="0000:%02x:00.0" % (0xd0 + n)) for n, g in enumerate(d["gpus"])]; json.dump(d, open(p, "w"))'
)


@pytest.fixture(scope="module")
def theatre() -> Iterator[Theatre]:
    """A host with Docker, GPUs and NVSwitches, no model yet, and a key that nobody else has."""
    sandbox("remove", "--scenario", SCENARIO)
    machine = ("--gpus", "NVIDIA H200:143771:8", "--hardware", "fabric=true")
    sandbox("add", "gpu01", "--scenario", SCENARIO, "--image", "ubuntu2404", *machine)
    name = SCENARIO + "-gpu01"
    variables = {"nvidia_driver_branch": "580", "ngc_api_key": ""}
    fleet = Fleet(SCENARIO, {"gpu_hosts": {"hosts": {name: {}}, "vars": variables}})
    host = fleet.host("gpu01")
    host.run("python3 -c '%s'" % ADDRESSES)
    host.reboot()
    fleet.site(environment={"NGC_API_KEY": ""})
    found = Theatre(fleet, host)
    yield found
    if found.key:
        found.world.remove_key(found.key)
    sandbox("remove", "--scenario", SCENARIO)


class Stage:
    """Plays what was not played yet when somebody asks for it."""

    def __init__(self, theatre: Theatre) -> None:
        self.theatre = theatre
        self.seen: dict[str, Seen] = {}
        #: Why those of a group that broke off have no result; they are not played once more for each.
        self.broken: dict[str, Exception] = {}
        self.began = time.monotonic()

    def with_key(self) -> None:
        if not self.theatre.key:
            self.theatre.image, self.theatre.key = LLAMA, "nvapi-" + secrets.token_urlsafe(40)
            self.theatre.world.set_key(self.theatre.key)

    def of(self, situation: Situation) -> Seen:
        if situation.name not in self.seen:
            if situation.name in self.broken:
                raise self.broken[situation.name]
            group, play = self.group(situation)
            try:
                self.keep(play())
            except Exception as error:
                self.broken.update({one.name: error for one in group})
                raise
        return self.seen[situation.name]

    def group(self, wanted: Situation) -> tuple[Sequence[Situation], Callable[[], dict[str, Seen]]]:
        """Those that are played together with one, and how."""
        for table in (IN_CONTAINER, WITH_KEY, LAST):
            for batch in batches(table):
                if wanted in batch:
                    if table is not IN_CONTAINER:
                        self.with_key()
                    return batch, lambda batch=batch: self.theatre.play(batch)
        self.with_key()
        injection = next(name for name, table in ON_HOST.items() if wanted in table)
        return ON_HOST[injection], lambda: self.theatre.breaks(ON_HOST[injection], injection)

    def keep(self, found: dict[str, Seen]) -> None:
        self.seen.update(found)
        print(report(found))


@pytest.fixture(scope="module")
def stage(theatre: Theatre) -> Iterator[Stage]:
    found = Stage(theatre)
    yield found
    seconds = sorted(one.seconds for one in found.seen.values())
    print("%d situations in %d s" % (len(seconds), time.monotonic() - found.began))
    if seconds:
        print("from the line to the end: median %.1f s, longest %.1f s" % (seconds[len(seconds) // 2], seconds[-1]))


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_situation(stage: Stage, situation: Situation) -> None:
    assert problems(situation, stage.of(situation)) == []


@pytest.fixture(scope="module")
def refused(theatre: Theatre) -> dict[str, Any]:
    faults = [getattr(theatre.world, one.world[0])(**one.world[1]) for one in REFUSALS if one.world]
    hosts = {
        "refusal-" + one.name: {
            **theatre.connection,
            "wanted": one.image,
            "key": getattr(control, one.key) if one.key else "",
        }
        for one in REFUSALS
    }
    try:
        run = theatre.fleet.attempt(
            REGISTRY, "--forks", "6", inventory={"refusals": {"hosts": hosts}, "logins": {"hosts": {}}}
        )
    finally:
        for fault in faults:
            theatre.world.mend(fault)
    return {name: run.of(name)[-1] for name in hosts}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_refusal(refused: dict[str, Any], refusal: Refusal) -> None:
    entry = refused["refusal-" + refusal.name]
    result = entry["result"]
    assert (entry["outcome"], result.get("reason")) == ("failed", refusal.reason), result
    assert [text for text in refusal.says if text not in result["msg"]] == [], result["msg"]
    assert entry["at"] - entry["began"] < 20


def test_login_with_a_key_that_has_expired(theatre: Theatre) -> None:
    """reg-69: the registry's word for it is the key service's 401."""
    # By itself: Ansible ends a run in which all hosts of a play have failed.
    hosts = {"login-expired": {**theatre.connection, "key": control.KEY_EXPIRED}}
    run = theatre.fleet.attempt(REGISTRY, inventory={"refusals": {"hosts": {}}, "logins": {"hosts": hosts}})
    entry = run.of("login-expired")[-1]
    assert (entry["outcome"], entry["result"].get("reason")) == ("failed", "bad_key"), entry
    assert "new one" in entry["result"]["msg"], entry


def test_tls_interception(theatre: Theatre) -> None:
    """reg-70: what stands in between signs with an authority that the host does not know."""
    certificate = "/usr/local/share/ca-certificates/gpu-fleet-sandbox.crt"
    host = theatre.host
    host.run("mv %s /root/ && update-ca-certificates --fresh >/dev/null 2>&1" % certificate)
    try:
        hosts = {"refusal-tls": {**theatre.connection, "wanted": REFUSALS[0].image, "key": ""}}
        run = theatre.fleet.attempt(REGISTRY, inventory={"refusals": {"hosts": hosts}, "logins": {"hosts": {}}})
    finally:
        host.run("mv /root/gpu-fleet-sandbox.crt %s && update-ca-certificates --fresh >/dev/null 2>&1" % certificate)
    entry = run.of("refusal-tls")[-1]
    assert (entry["outcome"], entry["result"].get("reason")) == ("failed", "tls_error"), entry
    assert "certificate" in entry["result"]["msg"] and "CA" in entry["result"]["msg"], entry
