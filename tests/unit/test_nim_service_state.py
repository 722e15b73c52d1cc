# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is seen of services, images and containers."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service import NimService
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service_state import PROXY_LOOKS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._read_only_host import DockerLook
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from nim_machine import (
    LLAMA,
    Machine,
    failure,
    llama,
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_the_pin_of_nim_image_decides_not_the_tag(machine: Machine) -> None:
    machine.converge(llama())
    pinned = {"source": "mirror.example/ngc/llama", "digest": "sha256:" + "cd" * 32, "image_id": "sha256:" + "9" * 64}
    machine.host.dirs.add("/var/lib/gpu_fleet")
    machine.host.files["/var/lib/gpu_fleet/images.json"] = json.dumps({"schema": 1, "images": {LLAMA: pinned}}).encode()
    machine.api.images["pinned"] = dict(machine.api.images[LLAMA], Id=pinned["image_id"], RepoDigests=[])
    (change,) = [change for change in machine.plan(llama()) if change.action == "restart"]
    assert (change.after, change.disruption) == ("restarted", Disruption.RESTART_NIM)
    machine.converge(llama())
    found = json.loads(machine.host.files["/etc/nim/llama.json"])
    assert found["digest"] == pinned["digest"]
    # Also where somebody took that name from the image: nim_image gives it back, and nothing must restart for it.
    assert found["create"][-1] == "%s@%s" % (pinned["source"], pinned["digest"])


def test_a_proxy_whose_container_is_just_being_started(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.converge(llama())
    ports = machine.api.list["nim-llama"]["Ports"]
    machine.api.list["nim-llama"]["Ports"] = []
    machine.listen(8000, 1212, "docker-proxy")
    before = machine.host.clock
    said = failure(machine, llama(environment={"A": "1"})).message
    assert (
        "held by docker-proxy (pid 1212) of unit docker-proxy.service, which Docker has left behind for a container"
        in said
    )
    assert "most likely an earlier nim-llama); end it with 'kill 1212'" in said
    assert machine.host.clock - before == PROXY_LOOKS

    def started(seconds: float) -> None:
        machine.api.list["nim-llama"]["Ports"] = ports or [
            {"IP": "0.0.0.0", "PublicPort": 8000, "PrivatePort": 8000, "Type": "tcp"}
        ]

    monkeypatch.setattr(machine.host, "sleep", started)
    assert machine.plan(llama(environment={"A": "1"}))


def test_a_container_that_ends_again_and_again_is_no_stranger(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.converge(llama())
    machine.api.list.clear()
    machine.listen(8000, 1212, "docker-proxy")

    def another(seconds: float) -> None:
        machine.host.links.clear()
        machine.listen(8000, 2000 + int(machine.host.clock), "docker-proxy")
        machine.host.clock += seconds

    monkeypatch.setattr(machine.host, "sleep", another)
    changed = llama(environment={"A": "1"})
    assert machine.plan(changed)
    # With its unit down they are somebody else's.
    machine.active["nim-llama.service"] = "inactive"
    said = failure(machine, changed).message
    assert "docker-proxy" in said and "stop that first" in said


def test_the_plan_asks_docker_anew_for_the_container_of_a_proxy(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(api: DockerApi, path: str, parameters: t.Any = None) -> t.Any:
        asked.append(path)
        # The container is there from the second look on.
        containers = machine.api.containers() if asked.count("/containers/json") > 1 else []
        return {"/version": {"Version": "26.1.5"}, "/info": machine.api.info(), "/containers/json": containers}.get(
            path
        )

    monkeypatch.setattr(DockerApi, "get", answer)
    machine.api.put("other", port=8000)
    machine.listen(8000, 1212, "docker-proxy")
    service = NimService(parse_models([llama()]), api=DockerLook())
    (listener,) = service.observe(machine.host).listeners
    assert (listener.container, asked.count("/containers/json")) == ("other", 2)


def test_broken_record_of_images_is_reported_and_left(machine: Machine) -> None:
    machine.host.files["/var/lib/gpu_fleet/images.json"] = b"{"
    assert failure(machine, llama()).reason == "state_unreadable"
    assert machine.host.files["/var/lib/gpu_fleet/images.json"] == b"{"


@pytest.mark.parametrize(
    ("engine", "driver", "host_config", "settings", "endangered"),
    [
        ("26.1.5", "systemd", {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]}, "", True),
        ("26.1.5", "cgroupfs", {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]}, "", False),
        ("29.0.0", "systemd", {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]}, "", False),
        ("26.1.5", "systemd", {"DeviceRequests": [{"Driver": "cdi", "Capabilities": [["gpu"]]}]}, "", False),
        ("26.1.5", "systemd", {"Runtime": "nvidia"}, 'mode = "jit-cdi"', False),
        ("26.1.5", "systemd", {"Runtime": "nvidia"}, '[nvidia-container-runtime]\nmode = "legacy"', True),
        ("26.1.5", "systemd", {"Runtime": "runc", "DeviceRequests": None}, 'mode = "legacy"', False),
    ],
)
def test_who_is_endangered(
    machine: Machine, engine: str, driver: str, host_config: dict[str, t.Any], settings: str, endangered: bool
) -> None:
    machine.api.engine, machine.api.driver = engine, driver
    machine.api.put("trainer")
    machine.api.host_config["trainer"] = host_config
    machine.host.files["/etc/nvidia-container-runtime/config.toml"] = settings.encode()
    state = machine.resource(llama()).observe(machine.host)
    assert state.endangered == (("trainer",) if endangered else ())
