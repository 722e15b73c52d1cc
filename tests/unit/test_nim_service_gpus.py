# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A model keeps the GPUs that it serves on, also where the file that names them is lost."""

from __future__ import annotations

import dataclasses
import json

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from nim_machine import GPUS, LLAMA, ONE, ZERO, Machine, failure, llama, nemo

FILE = "/etc/nim/llama.json"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(monkeypatch)
    # As images of CUDA have it.
    made.api.images[LLAMA]["Config"]["Env"] = ["NVIDIA_VISIBLE_DEVICES=all"]
    return made


def serves(machine: Machine, name: str = "llama", injection: str = "runtime", *, gpu: int = 0) -> None:
    """The container of a service computes on a GPU, and Docker shows how it was made."""
    pid, container, uuid = 4000 + gpu, "nim-" + name, GPUS[gpu].uuid
    gpus = list(machine.inventory.gpus)
    process = {"pid": pid, "type": "C", "name": "/usr/bin/python3", "used_memory_mib": 90000}
    gpus[gpu] = dataclasses.replace(gpus[gpu], processes=(process,))
    machine.inventory = dataclasses.replace(machine.inventory, gpus=tuple(gpus))
    scope = "0::/system.slice/docker-%s.scope" % machine.api.list[container]["Id"]
    machine.host.files["/proc/%d/cgroup" % pid] = scope.encode()
    made = json.loads(machine.host.files["/etc/nim/%s.json" % name])["create"]
    requests = {
        "runtime": None,
        "cdi": [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=" + uuid]}],
        "gpus": [{"Driver": "", "DeviceIDs": [uuid], "Capabilities": [["gpu"]]}],
    }
    variables = {"NVIDIA_VISIBLE_DEVICES": "all"}
    variables.update(word[len("--env=") :].split("=", 1) for word in made if word.startswith("--env="))
    machine.api.inspected[container] = {
        "Config": {"Env": ["%s=%s" % pair for pair in variables.items()]},
        "HostConfig": {"DeviceRequests": requests[injection]},
    }


@pytest.mark.parametrize(
    "content", [None, b"", b'{"gpus": ["GPU-', b"[]", b'{"gpus": []}', b'{"gpus": 7}', b'{"gpus": [7]}']
)
def test_a_model_whose_file_is_lost_keeps_its_gpu(machine: Machine, content: bytes | None) -> None:
    machine.converge(llama())
    serves(machine)
    before = machine.host.files.pop(FILE)
    if content is not None:
        machine.host.files[FILE] = content
    (change,) = machine.plan(llama())
    assert (change.what, change.disruption) == (FILE, Disruption.NONE)
    machine.converge(llama())
    assert machine.host.files[FILE] == before
    assert machine.plan(llama()) == []


@pytest.mark.parametrize("injection", ["runtime", "cdi", "gpus"])
def test_whichever_way_the_container_got_its_gpu(machine: Machine, injection: str) -> None:
    machine.converge(llama(), injection=injection)
    serves(machine, injection=injection)
    before = machine.host.files.pop(FILE)
    (change,) = machine.converge(llama(), injection=injection).changes
    assert (change.what, machine.host.files[FILE]) == (FILE, before)


def test_gpus_that_somebody_wrote_into_the_file(machine: Machine) -> None:
    machine.converge(llama())
    serves(machine)
    before = machine.host.files[FILE]
    machine.host.files[FILE] = json.dumps(dict(json.loads(before), gpus=[ONE])).encode()
    (change,) = machine.converge(llama()).changes
    assert (change.what, machine.host.files[FILE]) == (FILE, before)


def test_gpus_of_a_container_that_somebody_made_are_not_the_models(machine: Machine) -> None:
    machine.converge(llama())
    serves(machine)
    machine.api.inspected["nim-llama"]["Config"]["Env"] = ["NVIDIA_VISIBLE_DEVICES=" + ONE]
    (change,) = machine.plan(llama())
    assert change.why.startswith("the container was made or changed by hand: ") and "; on GPU" not in change.why
    resource = machine.resource(llama())
    assert resource.configurations(resource.observe(machine.host))["llama"]["gpus"] == [ZERO]
    # It tells nothing that could be taken for a GPU: indices may mean others today.
    machine.api.inspected["nim-llama"]["Config"]["Env"] = ["NVIDIA_VISIBLE_DEVICES=1"]
    del machine.host.files[FILE]
    assert machine.resource(llama()).observe(machine.host).service("llama").gpus == ()


def test_what_is_paused_or_still_fetched_keeps_its_gpu_too(machine: Machine) -> None:
    machine.converge(llama())
    serves(machine)
    before = machine.host.files.pop(FILE)
    machine.api.list["nim-llama"]["State"] = "paused"
    assert {change.what for change in machine.converge(llama()).changes} == {FILE, "nim-llama.service"}
    assert machine.host.files.pop(FILE) == before
    # Before the service there is the container that fetches its files.
    machine.api.put("nim-llama-download")
    machine.api.inspected["nim-llama-download"] = machine.api.inspected.pop("nim-llama")
    del machine.api.list["nim-llama"]
    machine.host.files["/proc/4000/cgroup"] = b"0::/system.slice/docker-%s.scope" % (
        machine.api.list["nim-llama-download"]["Id"].encode()
    )
    (change,) = machine.converge(llama()).changes
    assert (change.what, machine.host.files[FILE]) == (FILE, before)


def test_a_service_outside_the_list_is_known_by_its_container(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    serves(machine)
    machine.api.list["nim-llama"]["Labels"]["io.gpu-fleet.nim.name"] = "llama"
    # Of another one that copied the label nothing is known.
    machine.api.put("trainer")
    machine.api.list["trainer"]["Labels"]["io.gpu-fleet.nim.name"] = "trainer"
    del machine.host.files[FILE]
    error = failure(machine, nemo(gpus=2))
    assert (error.reason, "llama (not in the list)" in error.message) == ("gpus_unavailable", True)
    assert machine.converge(nemo()).changes == []
    (orphan,) = machine.answer["orphans"]
    assert (orphan["name"], orphan["gpus"], orphan["state"]) == ("llama", [ZERO], "started")
    machine.converge(remove_all=True)
    assert [name for name in machine.api.list if name.startswith("nim-")] == []
