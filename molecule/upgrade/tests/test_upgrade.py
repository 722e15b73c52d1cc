# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Another driver on hosts that serve, while clients keep asking. The tests build on each other, in this order."""

from __future__ import annotations

import json
import pathlib
import threading
import time
from collections.abc import Iterator

import pytest
from fleet_testing import Fleet, Host

FLEET = Fleet("upgrade")
HOSTS = {name: FLEET.host(name) for name in ("gpu01", "gpu02")}
RECORD = "/var/lib/gpu_fleet/driver-upgrade.json"
PORT = 8000


def loaded(host: Host) -> str:
    return host.run("cat /sys/module/nvidia/version", check=False)


def versions() -> list[str]:
    return [loaded(host) for host in HOSTS.values()]


class Balancer:
    """Clients behind a balancer of the operator's own, which asks only hosts that are not drained."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.states = folder
        self.command = folder / "balancer"
        # Requests that run when it is told have ended when it returns.
        self.command.write_text(
            '#!/bin/sh\necho "$DRIVER_UPGRADE_STATE" > "%s/$DRIVER_UPGRADE_HOST"; sleep 3\n' % folder
        )
        self.command.chmod(0o755)
        self.answers: list[tuple[float, str, int]] = []
        self.end = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(2)]

    def state(self, host: Host) -> str:
        path = self.states / host.name
        return path.read_text().strip() if path.exists() else "enabled"

    def _ask(self, number: int) -> None:
        turn = number
        while not self.end.is_set():
            hosts = [host for host in HOSTS.values() if self.state(host) == "enabled"]
            turn += 1
            if not hosts:
                self.answers.append((time.monotonic(), "", 0))
            else:
                host = hosts[turn % len(hosts)]
                status = host.complete(PORT, "meta/llama-3.1-8b-instruct")[0]
                self.answers.append((time.monotonic(), host.name, status))
            self.end.wait(0.1)

    def __enter__(self) -> Balancer:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        for thread in self.threads:
            thread.join(30)

    @property
    def options(self) -> list[str]:
        values = {"driver_upgrade_drain": "command", "driver_upgrade_drain_command": [str(self.command)]}
        return ["-e", json.dumps(values)]

    @property
    def failures(self) -> list[tuple[float, str, int]]:
        return [answer for answer in self.answers if answer[2] != 200]


@pytest.fixture
def balancer(tmp_path: pathlib.Path) -> Iterator[Balancer]:
    with Balancer(tmp_path) as running:
        yield running
    assert len(running.answers) > 20
    assert running.failures == []


def test_check_mode_tells_the_plan_and_changes_nothing() -> None:
    run = FLEET.play("upgrade_drivers", "--check", "-e", "nvidia_driver_branch=580")
    assert "Batch 1 (canary): upgrade-gpu01." in run.output
    assert "ready: llama 1 of 2" in run.output
    assert "Steps on upgrade-gpu01, upgrade-gpu02:" in run.output
    assert versions() == ["570.124.06"] * 2 and not HOSTS["gpu01"].succeeds("test -e %s" % RECORD)


def test_570_to_580_without_a_lost_request(balancer: Balancer, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.html"
    run = FLEET.play(
        "upgrade_drivers", "-e", "nvidia_driver_branch=580", "-e", "driver_upgrade_report=%s" % page, *balancer.options
    )
    assert versions() == ["580.95.05"] * 2
    assert "2 upgraded" in run.output and "2 upgraded" in page.read_text()
    for host in HOSTS.values():
        assert host.ready(PORT) and host.read_json(RECORD)["outcome"] == "upgraded"
        assert host.unit("llama", "ActiveState") == {"ActiveState": "active"}
        assert host.succeeds("systemctl is-active nvidia-persistenced")


def test_a_second_run_changes_nothing() -> None:
    before = {name: host.identity() for name, host in HOSTS.items()}
    run = FLEET.play("upgrade_drivers", "-e", "nvidia_driver_branch=580")
    assert run.changed == [] and "0 of 2 hosts are to be upgraded" in run.output
    assert {name: host.identity() for name, host in HOSTS.items()} == before


def test_a_module_that_cannot_be_built_goes_back_and_the_others_are_not_touched(balancer: Balancer) -> None:
    second = HOSTS["gpu02"].identity()
    run = FLEET.play(
        "upgrade_drivers",
        "-e",
        "nvidia_driver_branch=580",
        "-e",
        "nvidia_driver_version=580.82.07",
        *balancer.options,
        succeeds=False,
    )
    assert "The old driver 580.95.05 was put back and the services run on it again." in run.output
    assert versions() == ["580.95.05"] * 2
    assert HOSTS["gpu01"].read_json(RECORD)["outcome"] == "rolled_back"
    assert HOSTS["gpu01"].ready(PORT) and HOSTS["gpu02"].identity() == second


def test_a_controller_that_dies_in_the_middle(balancer: Balancer) -> None:
    wanted = ["-e", "nvidia_driver_branch=595", *balancer.options]
    FLEET.play_until(r"driver packages: ", "upgrade_drivers", *wanted)
    run = FLEET.play("upgrade_drivers", *wanted)
    assert versions() == ["595.45.04"] * 2
    assert "left by an earlier run" in run.output


def test_back_with_a_reboot(balancer: Balancer) -> None:
    boots = [host.boot_id() for host in HOSTS.values()]
    FLEET.play(
        "upgrade_drivers", "-e", "nvidia_driver_branch=580", "-e", "driver_upgrade_reboot=always", *balancer.options
    )
    assert versions() == ["580.95.05"] * 2
    assert not set(boots) & {host.boot_id() for host in HOSTS.values()}
    assert all(host.ready(PORT) for host in HOSTS.values())
