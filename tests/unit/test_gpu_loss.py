# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Containers that systemctl daemon-reload has taken the GPUs from are seen, explained and started anew."""

from __future__ import annotations

import time
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from fake_host import FakeHost
from nim_machine import LLAMA, ZERO, Machine, calls, llama

LOST = (255, "", "Failed to initialize NVML: Unknown Error")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A service that got its GPUs with --gpus from Docker 26, and systemd that was reloaded since."""
    machine = Machine(monkeypatch)
    machine.converge(llama(), injection="gpus")
    machine.api.host_config["nim-llama"] = {
        "DeviceRequests": [{"Driver": "", "DeviceIDs": [ZERO], "Capabilities": [["gpu"]]}]
    }
    machine.host.clock += 1000
    reloaded(machine, 10)
    return machine


def reloaded(machine: Machine, ago: float) -> None:
    machine.host.commands["systemctl show --property=UnitsLoadTimestampMonotonic *"] = "%d\n" % (
        (machine.host.monotonic() - ago) * 1e6
    )


def started(machine: Machine, monkeypatch: pytest.MonkeyPatch, ago: float) -> None:
    ask = machine.api.container
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S.5Z", time.gmtime(machine.host.time() - ago))

    def container(name: str) -> dict[str, t.Any] | None:
        found = ask(name)
        if found is not None:
            found["State"]["StartedAt"] = stamp
        return found

    monkeypatch.setattr(machine.api, "container", container)


def asked(machine: Machine) -> int:
    return len([call for call in machine.host.calls if call[:2] == ("docker", "exec")])


def test_a_loss_is_a_restart_that_says_why_and_ends_it(machine: Machine) -> None:
    def exec_(host: FakeHost, argv: tuple[str, ...], *_rest: t.Any) -> t.Any:
        return "GPU 0: NVIDIA H200" if len(calls(machine, "restart")) > 1 else LOST

    machine.host.commands["docker exec *"] = exec_
    (change,) = machine.plan(llama(), injection="gpus")
    assert (change.what, change.after, change.disruption) == (
        "nim-llama.service",
        "restarted",
        Disruption.RESTART_NIM,
    )
    assert change.why.endswith("as systemctl daemon-reload does to it: Failed to initialize NVML: Unknown Error")
    outcome = machine.converge(llama(), injection="gpus")
    assert [change.action for change in outcome.changes] == ["restart"]
    assert calls(machine, "restart")[-1] == "systemctl restart nim-llama.service"
    assert machine.plan(llama(), injection="gpus") == []


def test_one_that_has_them_is_left_alone(machine: Machine) -> None:
    assert machine.plan(llama(), injection="gpus") == []
    assert asked(machine) == 1


@pytest.mark.parametrize("answer", [(127, "", "nvidia-smi: not found"), (124, "", "no end after 30 seconds")])
def test_one_that_cannot_be_asked_is_left_alone(machine: Machine, answer: tuple[int, str, str]) -> None:
    machine.host.commands["docker exec *"] = answer
    assert machine.plan(llama(), injection="gpus") == []


def test_nobody_is_asked_who_was_started_after_the_reload(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.host.commands["docker exec *"] = LOST
    started(machine, monkeypatch, 5)
    assert machine.plan(llama(), injection="gpus") == []
    assert asked(machine) == 0
    started(machine, monkeypatch, 500)
    assert len(machine.plan(llama(), injection="gpus")) == 1


def test_old_systemd_does_not_say_when_it_was_reloaded(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.host.commands["systemctl show --property=UnitsLoadTimestampMonotonic *"] = "\n"
    machine.host.commands["docker exec *"] = LOST
    started(machine, monkeypatch, 5)
    assert len(machine.plan(llama(), injection="gpus")) == 1


def test_without_danger_nothing_is_asked(machine: Machine) -> None:
    machine.api.host_config["nim-llama"] = {"Runtime": "nvidia"}
    machine.host.calls.clear()
    assert machine.plan(llama(), injection="gpus") == []
    assert asked(machine) == 0
    assert not [call for call in machine.host.calls if "UnitsLoad" in " ".join(call)]


def test_what_our_own_reload_takes_is_given_back_in_the_same_run(machine: Machine) -> None:
    state = {"lost": False}

    def exec_(*_rest: t.Any) -> t.Any:
        return LOST if state["lost"] else "GPU 0: NVIDIA H200"

    def reload(*rest: t.Any) -> str:
        state["lost"] = True
        return machine.daemon_reload(*rest)

    def restart(host: FakeHost, argv: tuple[str, ...], *rest: t.Any) -> str:
        state["lost"] = False
        return machine.restart(host, argv, *rest)

    commands = {"docker exec *": exec_, "systemctl daemon-reload": reload, "systemctl restart *": restart}
    machine.host.commands.update(commands)
    other = {"name": "other", "image": LLAMA, "port": 8001}
    machine.converge(llama(), other, injection="gpus")
    restarted = [call for call in calls(machine, "restart")[1:] if "nim-llama" in call]
    assert restarted == ["systemctl restart nim-llama.service"]
    assert "nim-llama has lost its GPUs" in machine.answer["warnings"][0]
    assert "is started anew" in machine.answer["warnings"][0]
