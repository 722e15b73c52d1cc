# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What keeps a service from being set up or started is said before anything is changed."""

from __future__ import annotations

import dataclasses
import json
import re
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_bus import PciGpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import LoadedDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import UNIT_DIRECTORY
from nim_machine import (
    FIB_TRIE,
    IF_INET6,
    ONE,
    SMI,
    ZERO,
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


def test_an_image_for_another_machine_is_as_good_as_none(machine: Machine) -> None:
    for image in machine.api.images.values():
        image["Architecture"] = "arm64"
    assert failure(machine, llama()).reason == "image_missing"
    for image in machine.api.images.values():
        image["Architecture"] = "amd64"
    assert machine.plan(llama())[0].action == "directory"


@pytest.mark.parametrize(("engine", "words"), [("26.1.5", "CDI feature is off"), ("24.0.7", "24.0.7 has no CDI")])
def test_cdi_off(machine: Machine, engine: str, words: str) -> None:
    machine.api.cdi, machine.api.engine = [], engine
    (change,) = machine.plan(llama(), injection="cdi")
    assert (change.action, change.data["reason"]) == ("prerequisite", "cdi_off")
    assert words in change.data["message"] and "to runtime." in change.data["message"]
    assert machine.plan(llama())[0].action == "directory"


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


# -- the condition of the GPUs --------------------------------------------------------------------


def in_xml(machine: Machine, values: dict[str, str], *, gpu: int = 0) -> None:
    """Other texts in elements of the capture, in one GPU."""
    pieces = SMI.read_text().split("</gpu>")
    for name, value in values.items():
        pieces[gpu], count = re.subn(r"<%s>[^<]*</%s>" % (name, name), "<%s>%s</%s>" % (name, value, name), pieces[gpu])
        assert count, name
    _cuda, version, gpus = parse_smi("</gpu>".join(pieces))
    machine.inventory = GpuInventory(
        pci=machine.inventory.pci, driver=LoadedDriver(version, "open", True), gpus=gpus, smi_driver_version=version
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"remapped_row_pending": "Yes"}, "row_remap_pending"),
        ({"gpu_recovery_action": "GPU Reset"}, "recovery_action"),
        ({"compute_mode": "Prohibited"}, "compute_mode"),
        ({"sram_threshold_exceeded": "Yes"}, "sram_threshold_exceeded"),
    ],
)
def test_no_start_on_a_gpu_that_is_not_fit(machine: Machine, values: dict[str, str], reason: str) -> None:
    in_xml(machine, values)
    error = failure(machine, llama(gpus=[0]))
    assert error.reason == reason
    assert error.message.startswith("Model llama cannot be started: GPU 0 (NVIDIA H200, %s) " % ZERO)
    assert "gpu_health (nim_gpu_health) = warn. Nothing was changed." in error.message
    assert [verdict["gpu"] for verdict in error.facts["verdicts"]] == [ZERO]
    assert machine.host.dirs == {UNIT_DIRECTORY, "/run/nim"}
    # The other one is fit.
    machine.converge(llama(gpus=[1]))
    assert machine.answer["warnings"] == []


def test_accepted_knowingly(machine: Machine) -> None:
    in_xml(machine, {"remapped_row_pending": "Yes"})
    machine.converge(llama(gpus=[0]), health="warn")
    (warning,) = machine.answer["warnings"]
    assert warning.startswith("Model llama: GPU 0 (") and "'nvidia-smi --gpu-reset -i 0'" in warning
    with pytest.raises(FleetError, match="gpu_health = 'never'"):
        machine.resource(llama(), health="never")


def test_what_runs_on_an_unfit_gpu_is_left_alone(machine: Machine) -> None:
    machine.converge(llama(gpus=[0]))
    in_xml(machine, {"gpu_recovery_action": "GPU Reset"})
    assert machine.converge(llama(gpus=[0])).changes == []
    assert "needs recovery" in machine.answer["warnings"][0]
    # A stop is no start.
    machine.converge(llama(gpus=[0], state="stopped"))
    assert failure(machine, llama(gpus=[0])).reason == "recovery_action"


def test_a_gpu_that_does_not_tell_is_not_refused(machine: Machine) -> None:
    silent = ("gpu_recovery_action", "remapped_row_pending", "remapped_row_failure", "current_ecc", "compute_mode")
    in_xml(machine, dict.fromkeys((*silent, "total", "used", "free"), "N/A"))
    machine.host.commands["dmesg"] = ""
    machine.converge(llama(gpus=[0], gpu_memory="100GB"))
    assert machine.answer["warnings"] == []


def test_without_a_recovery_action_the_kernels_log_decides(machine: Machine) -> None:
    in_xml(machine, {"gpu_recovery_action": "N/A"})
    machine.host.commands["journalctl *"] = json.dumps(
        {"MESSAGE": "NVRM: Xid (PCI:0000:00:06): 119, pid=1, Timeout", "__REALTIME_TIMESTAMP": "1"}
    )
    assert failure(machine, llama(gpus=[0])).reason == "xid"


def test_an_exclusive_gpu_held_by_a_service_that_leaves(machine: Machine) -> None:
    machine.converge(llama(gpus=[0]))
    in_xml(machine, {"compute_mode": "Exclusive_Process"})
    computes(machine, 77, "nim-llama", 9, 140000)
    machine.converge(llama(gpus=[0], state="absent"), nemo(gpus=[0]))
    assert machine.answer["services"][1]["state"] == "started"


def test_an_exclusive_gpu_held_by_somebody_else_is_no_way_out(machine: Machine) -> None:
    machine.converge(llama(gpus=[1]))
    in_xml(machine, {"compute_mode": "Exclusive_Process"})
    computes(machine, 77, "", 9, 140000)
    assert failure(machine, llama(gpus=[0])).reason == "compute_mode_busy"


def test_an_exclusive_gpu_held_by_the_model_itself(machine: Machine) -> None:
    machine.converge(llama(gpus=[0]))
    in_xml(machine, {"compute_mode": "Exclusive_Process"})
    busy = dataclasses.replace(
        machine.inventory.gpus[0], processes=({"pid": 77, "type": "C", "name": "x", "used_memory_mib": 9},)
    )
    machine.inventory = dataclasses.replace(machine.inventory, gpus=(busy, *machine.inventory.gpus[1:]))
    assert machine.converge(llama(gpus=[0], environment={"A": "1"})).changes
    machine.converge(llama(gpus=[0], state="stopped"))
    error = failure(machine, llama(gpus=[0]))
    assert error.reason == "compute_mode_busy"
    assert "held by x (pid 77)" in error.message


# -- memory and disk --------------------------------------------------------------------------------


def computes(machine: Machine, pid: int, container: str, used: int | None, free: int) -> None:
    """A process on the first GPU."""
    process = {"pid": pid, "type": "C", "name": "/usr/bin/python3 --key=x", "used_memory_mib": used}
    first = dataclasses.replace(
        machine.inventory.gpus[0], processes=(process,), memory_free_mib=free, memory_used_mib=143156 - free
    )
    machine.inventory = dataclasses.replace(machine.inventory, gpus=(first, *machine.inventory.gpus[1:]))
    scope = "docker-%s.scope" % machine.api.list[container]["Id"] if container else "train.service"
    machine.host.files["/proc/%d/cgroup" % pid] = b"0::/system.slice/" + scope.encode()


def test_memory_that_is_not_free(machine: Machine) -> None:
    computes(machine, 812, "", 100000, 43000)
    error = failure(machine, llama(gpus=[0], gpu_memory="80GB"))
    assert error.reason == "gpu_memory"
    assert "needs 81920 MiB of free memory" in error.message
    assert "43000 MiB of 143771 MiB free, held by python3 (pid 812): 100000 MiB; stop that" in error.message
    assert "key" not in error.message
    assert (error.facts["needed_mib"], error.facts["free_mib"]) == (81920, 43000)
    machine.converge(llama(gpus=[1], gpu_memory="80GB"))


def test_more_memory_than_the_gpu_has(machine: Machine) -> None:
    error = failure(machine, llama(gpu_memory="200GB"))
    assert error.reason == "gpus_unavailable"
    assert "0 are free with the 200.0 GiB of memory that it needs" in error.message
    # What the driver reserves is not free either.
    error = failure(machine, llama(gpu_memory="143500MiB"))
    assert error.reason == "gpu_memory"
    assert "143156 MiB of 143771 MiB free; give the model other GPUs" in error.message


@pytest.mark.parametrize("used", [120000, None])
def test_memory_of_a_service_that_is_restarted_counts_as_free(machine: Machine, used: int | None) -> None:
    machine.converge(llama(gpus=[0], gpu_memory="80GB"))
    computes(machine, 900, "nim-llama", used, 23000)
    assert machine.plan(llama(gpus=[0], gpu_memory="80GB")) == []
    machine.converge(llama(gpus=[0], gpu_memory="81GB", environment={"A": "1"}))
    # That of another one does not.
    machine.api.put("trainer")
    computes(machine, 901, "trainer", used, 23000)
    error = failure(machine, llama(gpus=[0], gpu_memory="82GB", environment={"A": "2"}))
    assert "python3 (pid 901) of container trainer" in error.message


def test_disk_space_is_looked_at_again_before_a_start(machine: Machine) -> None:
    machine.host.free = 5 * 10**9
    error = failure(machine, llama(disk_space="10GB"), nemo())
    assert error.reason == "disk_full"
    assert "/var/lib/nim/cache/llama on / needs about 10.7 GB for model llama: 10.7 GB" in error.message
    assert machine.host.dirs == {UNIT_DIRECTORY, "/run/nim"}
    # What is there already is not fetched again.
    machine.host.dirs.add("/var/lib/nim/cache/llama")
    machine.host.commands["du -s -B1 /var/lib/nim/cache/llama"] = "6000000000\t/x\n"
    machine.converge(llama(disk_space="10GB"), nemo())


def test_a_model_that_was_fetched_needs_no_more_disk(machine: Machine) -> None:
    machine.converge(llama(disk_space="10GB"))
    machine.converge(llama(disk_space="10GB", state="stopped"))
    machine.host.free = 10**9
    assert failure(machine, llama(disk_space="10GB")).reason == "disk_full"
    key = json.loads(machine.host.files["/etc/nim/llama.json"])["download"]["key"]
    marker = "/var/lib/nim/state/llama.download.json"
    machine.host.files[marker] = json.dumps({"status": "complete", "key": "of another profile"}).encode()
    assert failure(machine, llama(disk_space="10GB")).reason == "disk_full"
    there = {"status": "complete", "key": key}
    served = {"status": "incomplete", "key": "of another image", "proven": {key: "/var/lib/nim/cache/llama"}}
    for record in (there, served):
        machine.host.files[marker] = json.dumps(record).encode()
        assert machine.plan(llama(disk_space="10GB"))
    machine.converge(llama(disk_space="10GB"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_broken_note_of_what_was_fetched_is_warned_of(machine: Machine, content: bytes) -> None:
    marker = "/var/lib/nim/state/llama.download.json"
    machine.converge(llama())
    machine.host.files[marker] = content
    machine.converge(llama())
    (warning,) = machine.answer["warnings"]
    assert warning.startswith("Reading %s failed: " % marker)
    assert warning.endswith("the next start of nim-llama.service fetches again what it needs, and writes it anew.")
    assert machine.host.files[marker] == content


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ([llama(gpus=2), nemo(gpus=1)], "gpus_unavailable"),
        ([llama(gpu_memory="143500MiB")], "gpu_memory"),
        ([llama(disk_space="900GB", cache_directory="/srv/a")], "disk_full"),
        ([llama(bind_address="172.30.2.9")], "no_such_address"),
    ],
)
def test_what_cannot_work_is_said_before_the_image_is_there(
    machine: Machine, models: list[dict[str, t.Any]], reason: str
) -> None:
    machine.api.images.clear()
    machine.host.free = 10**11
    machine.host.files["/proc/net/fib_trie"] = FIB_TRIE.encode()
    with pytest.raises(FleetError) as caught:
        machine.plan(*models)
    assert caught.value.reason == reason
    # What runs already is not judged by what it would need to start.
    machine.api.put("nim-llama")
    machine.api.put("nim-nemo")
    if reason != "gpus_unavailable":
        assert {change.action for change in machine.plan(*models)} == {"prerequisite"}


def test_a_count_leaves_out_a_gpu_that_is_not_fit(machine: Machine) -> None:
    in_xml(machine, {"gpu_recovery_action": "GPU Reset"})
    machine.converge(llama(gpus=1))
    assert machine.answer["services"][0]["gpus"] == [ONE]
    assert machine.answer["warnings"] == []
    error = failure(machine, llama(gpus=1), nemo(gpus=1))
    assert error.reason == "recovery_action"
    assert "No other GPU of this host is free for it." in error.message
    error = failure(machine, llama(gpus=1), nemo(gpus=2))
    assert error.reason == "gpus_unavailable"
    assert "free, not fit for service (needs recovery: the driver asks for 'GPU Reset')" in error.message


def test_a_model_that_serves_is_not_moved_from_a_gpu_that_is_no_longer_fit(machine: Machine) -> None:
    machine.converge(llama(gpus=1))
    in_xml(machine, {"gpu_recovery_action": "GPU Reset"})
    assert machine.converge(llama(gpus=1)).changes == []
    assert machine.answer["services"][0]["gpus"] == [ZERO]
    assert "needs recovery" in machine.answer["warnings"][0]
    # Not even in a restart for another cause: somebody may count on where it is.
    error = failure(machine, llama(gpus=1, environment={"A": "1"}))
    assert error.reason == "recovery_action"
    assert "'systemctl stop nim-llama' lets it move to other GPUs" in error.message


def test_a_model_that_does_not_run_moves_and_the_change_says_why(machine: Machine) -> None:
    machine.converge(llama(gpus=1))
    in_xml(machine, {"gpu_recovery_action": "GPU Reset"})
    machine.stop(machine.host, ("systemctl", "stop", "nim-llama.service"))
    (started,) = [change for change in machine.converge(llama(gpus=1)).changes if change.action == "restart"]
    assert started.why == (
        "the service does not run; on GPU 1, because GPU 0 needs recovery: the driver asks for 'GPU Reset'"
    )
    assert machine.plan(llama(gpus=1)) == []


def test_an_exclusive_gpu_that_a_service_gives_up_is_as_good_as_another(machine: Machine) -> None:
    machine.converge(llama(gpus=[0]))
    in_xml(machine, {"compute_mode": "Exclusive_Process"})
    computes(machine, 77, "nim-llama", 9, 140000)
    machine.converge(llama(gpus=[0], state="absent"), nemo(gpus=2))
    assert machine.answer["services"][1]["gpus"] == [ZERO, ONE]
