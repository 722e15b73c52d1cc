# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sandbox's engine: what another checkout's sandbox left behind, and what is still its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sandbox"))
import traces
from fleet_sandbox import engine
from fleet_sandbox.common import SandboxError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with the bridge of another checkout's sandbox; what is run there."""
    (tmp_path / "net" / engine.BRIDGE / "brif").mkdir(parents=True)
    (tmp_path / "cgroup" / "gpu-fleet-sandbox-abc123").mkdir(parents=True)
    (tmp_path / "cgroup" / "gpu-fleet-sandbox-abc123" / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    commands = []
    monkeypatch.setattr(engine, "NETWORKS", tmp_path / "net")
    monkeypatch.setattr(engine, "_cgroup2", lambda: tmp_path / "cgroup")
    monkeypatch.setattr(engine, "run", lambda command, **options: commands.append(command))
    monkeypatch.setattr(engine, "ROOT", tmp_path / "sandbox")
    monkeypatch.setattr(engine, "STATE", tmp_path / "sandbox" / "state.json")
    monkeypatch.setattr(engine, "PIDFILE", tmp_path / "sandbox" / "pid")
    monkeypatch.setattr(engine, "EXEC_ROOT", tmp_path / "sandbox" / "exec")
    monkeypatch.setattr(engine, "SOCKET", tmp_path / "sandbox" / "socket")
    return tmp_path, commands


def test_the_bridge_of_a_sandbox_that_was_killed_is_removed(machine):
    engine._remove_dead_link()
    assert machine[1] == [["ip", "link", "del", engine.BRIDGE]]


def test_a_sandbox_with_processes_is_refused(machine):
    (machine[0] / "cgroup/gpu-fleet-sandbox-abc123/cgroup.events").write_text("populated 1\nfrozen 0\n")
    with pytest.raises(SandboxError, match=r"another sandbox runs on this machine .*abc123"):
        engine._remove_dead_link()
    assert machine[1] == []


def test_a_sandbox_with_hosts_on_the_bridge_is_refused(machine):
    (machine[0] / "net" / engine.BRIDGE / "brif" / "veth1").touch()
    with pytest.raises(SandboxError, match=r"another sandbox runs on this machine .*veth1"):
        engine._remove_dead_link()
    assert machine[1] == []


def test_down_leaves_the_network_of_another_sandbox(machine):
    engine.stop(keep_images=False)
    assert machine[1] == []


@pytest.mark.parametrize("other", ["dead", "living"])
def test_down_of_a_sandbox_that_was_killed(machine, other, monkeypatch):
    (machine[0] / "sandbox").mkdir()
    engine.STATE.write_text('{"ip_forward": "1"}')
    monkeypatch.setattr(engine, "_link_exists", lambda: True)
    monkeypatch.setattr(engine, "_pass_other_firewall_safely", lambda: None)
    if other == "living":
        (machine[0] / "cgroup/gpu-fleet-sandbox-abc123/cgroup.events").write_text("populated 1\nfrozen 0\n")
    engine.stop(keep_images=False)
    assert (["ip", "link", "del", engine.BRIDGE] in machine[1]) is (other == "dead")
    assert machine[1] == [] or other == "dead"
    assert not engine.STATE.exists()


def test_what_a_killed_sandbox_had_left_may_go_and_nothing_else():
    before = {
        "firewall": ["-A DOCKER-USER -i fleet0 -j ACCEPT", "-A FORWARD -j DROP", "table ip gpu_fleet_sandbox"],
        "network": ["eth0", "fleet0"],
        "process": ["7 sleep 9"],
        "route": ["172.30.0.0/16 dev fleet0 proto kernel", "default dev eth0"],
    }
    now = {"firewall": [], "network": ["eth0"], "process": [], "route": ["default dev eth0"]}
    wrong, leftovers = traces.differences(before, now)
    assert wrong == ["gone: firewall -A FORWARD -j DROP"]
    assert leftovers == [
        "gone: firewall -A DOCKER-USER -i fleet0 -j ACCEPT",
        "gone: firewall table ip gpu_fleet_sandbox",
        "gone: network fleet0",
        "gone: route 172.30.0.0/16 dev fleet0 proto kernel",
    ]


def test_what_a_sandbox_leaves_is_a_fault_whatever_its_name():
    before: dict[str, list[str]] = {"network": ["eth0"], "process": []}
    wrong, leftovers = traces.differences(before, {"network": ["eth0", "fleet0"], "process": ["9 dockerd"]})
    assert wrong == ["left behind: network fleet0", "left behind: process 9 dockerd"]
    assert not leftovers
