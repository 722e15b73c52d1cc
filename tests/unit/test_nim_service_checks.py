# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What keeps a service from being set up or started is said before anything is changed."""

from __future__ import annotations

import re
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import GpuInventory, PciGpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import (
    UNIT_DIRECTORY,
)
from nim_machine import (
    FIB_TRIE,
    IF_INET6,
    Machine,
    calls,
    failure,
    llama,
    nemo,
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_the_engine_port_of_2x_on_the_network_of_the_host(machine: Machine) -> None:
    wanted = nemo(port=8000, network_mode="host")
    machine.listen(8001, 977, "nginx")
    error = failure(machine, wanted)
    assert error.reason == "port_in_use" and error.facts["port"] == 8001
    assert "nginx (pid 977)" in error.message and "NIM_BACKEND_PORT" in error.message
    assert "/etc/nim/nemo.json" not in machine.host.files
    machine.converge(dict(wanted, environment={"NIM_BACKEND_PORT": 8101}))
    # Nobody else's network is shared: inside of the container the port is free.
    machine.converge(nemo(port=8000))


@pytest.mark.parametrize(
    ("bind_address", "ipv6", "words"),
    [
        ("0.0.0.0", "", ""),
        ("127.0.0.5", "", ""),
        ("172.30.2.2", "", ""),
        ("::", IF_INET6, ""),
        ("::", "", "IPv6 switched off"),
        ("172.30.2.9", IF_INET6, "one of its addresses (127.0.0.1, 172.30.2.2, ::1)"),
    ],
)
def test_an_address_that_the_host_has_not(machine: Machine, bind_address: str, ipv6: str, words: str) -> None:
    machine.host.files["/proc/net/fib_trie"] = FIB_TRIE.encode()
    machine.host.files["/proc/net/if_inet6"] = ipv6.encode()
    if not words:
        machine.plan(llama(bind_address=bind_address))
        return
    with pytest.raises(FleetError, match="bind_address = %s" % re.escape(bind_address)) as caught:
        machine.plan(llama(bind_address=bind_address))
    assert caught.value.reason == "no_such_address"
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([nemo(network_mode="host")], "the same model"),
        ([nemo(port=8000, network_mode="host"), llama(port=8001)], "model nemo"),
        ([llama(port=8001), nemo(port=8000, network_mode="host")], "the port of model llama"),
        (
            [nemo(port=8000, network_mode="host"), nemo(name="two", port=8002, network_mode="host")],
            "the engine's port of model nemo",
        ),
    ],
)
def test_engine_ports_of_2x_between_models(machine: Machine, models: list[dict[str, t.Any]], words: str) -> None:
    error = failure(machine, *models)
    assert error.reason == "invalid_option"
    assert words in error.message and "8001" in error.message and "NIM_BACKEND_PORT" in error.message
    assert not calls(machine, "restart")


def test_an_engine_port_that_is_none(machine: Machine) -> None:
    environment = {"NIM_BACKEND_PORT": "http"}
    assert "is no port" in failure(machine, nemo(network_mode="host", environment=environment)).message


def test_a_masked_unit_is_respected(machine: Machine) -> None:
    machine.converge(llama())
    path = UNIT_DIRECTORY + "/nim-llama.service"
    del machine.host.files[path]
    machine.host.links[path] = "/dev/null"
    error = failure(machine, llama())
    assert error.reason == "unit_masked"
    assert "systemctl unmask nim-llama.service" in error.message
    assert path not in machine.host.files
    assert [change.action for change in machine.plan(llama(state="stopped"))] == ["stop", "disable", "daemon_reload"]


def test_a_host_that_was_never_set_up_can_be_planned_but_not_changed(machine: Machine) -> None:
    machine.api.up = False
    machine.inventory = GpuInventory()
    (change,) = machine.plan(llama())
    assert (change.what, change.after) == ("nim-llama.service", "started")
    assert "not possible yet" in change.why
    error = failure(machine, llama())
    assert error.reason == "docker_unavailable"
    assert error.facts["changes"] == []
    assert (
        machine.resource(llama()).result(machine.resource(llama()).observe(machine.host))["services"][0]["gpus"] == []
    )


@pytest.mark.parametrize(
    ("inventory", "words"),
    [
        (GpuInventory(), "has no NVIDIA GPU"),
        (GpuInventory(pci=(PciGpu("x", "2335", "Hopper", ""),)), "driver is not loaded"),
    ],
)
def test_no_gpu(machine: Machine, inventory: GpuInventory, words: str) -> None:
    machine.inventory = inventory
    error = failure(machine, llama())
    assert error.reason == "no_gpu"
    assert words in error.message


def test_image_and_runtime_missing(machine: Machine) -> None:
    machine.api.runtimes = {"runc": {}}
    assert failure(machine, llama()).reason == "runtime_missing"
    assert machine.plan(llama(), injection="gpus")[0].action == "directory"
    machine.api.runtimes = {"nvidia": {}}
    machine.api.images.clear()
    error = failure(machine, llama())
    assert error.reason == "image_missing"
    assert "nim_image first" in error.message


def test_weights_must_be_there_and_readable(machine: Machine) -> None:
    error = failure(machine, llama(weights_directory="/srv/w"))
    assert error.reason == "directory_missing"
    assert "weights_directory = /srv/w does not exist" in error.message
    machine.host.dirs.add("/srv/w")
    machine.host.modes["/srv/w"] = (0o700, 0, 0)
    assert (
        "cannot be read by the container's user 1000:1000"
        in failure(machine, llama(weights_directory="/srv/w")).message
    )
    machine.host.modes["/srv/w"] = (0o750, 0, 1000)
    machine.converge(llama(weights_directory="/srv/w"))


def test_a_port_held_by_a_process_is_named_before_anything_is_done(machine: Machine) -> None:
    machine.listen(8000, 977, "nginx")
    error = failure(machine, llama())
    assert error.reason == "port_in_use"
    assert "port 8000 on 0.0.0.0: it is held by nginx (pid 977) of unit nginx.service;" in error.message
    assert machine.host.dirs == {UNIT_DIRECTORY, "/run/nim"}


def test_a_leftover_docker_proxy_is_named_with_its_container(machine: Machine) -> None:
    machine.listen(8000, 1212, "docker-proxy")
    machine.api.put("old-nim", port=8000)
    error = failure(machine, llama())
    assert "held by docker-proxy (pid 1212) of container old-nim" in error.message
    assert error.facts["container"] == "old-nim"
    machine.api.list.clear()
    machine.api.put("web")
    machine.host.links.clear()
    machine.listen(8000, 1213, "nginx", machine.api.list["web"]["Id"])
    assert "held by nginx (pid 1213) of container web" in failure(machine, llama()).message
    machine.api.list.clear()
    machine.api.put("old-nim", port=8000)
    del machine.host.files["/proc/net/tcp"]
    assert "held by container old-nim" in failure(machine, llama()).message


def test_an_own_port_is_no_conflict_nor_is_one_that_is_given_up(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    machine.api.list["nim-llama"]["Ports"] = [{"IP": "0.0.0.0", "PublicPort": 8000, "PrivatePort": 8000, "Type": "tcp"}]
    machine.plan(llama(environment={"A": "1"}), nemo())
    machine.plan(llama(port=8002), nemo(port=8000))
    machine.plan(llama(state="absent"), nemo(port=8000))
    with pytest.raises(FleetError, match="container nim-llama"):
        machine.plan(nemo(port=8000))


def test_a_port_of_a_service_that_is_not_started_now_is_not_looked_at(machine: Machine) -> None:
    machine.converge(llama())
    machine.listen(8000, 977, "nginx")
    assert machine.plan(llama()) == []
