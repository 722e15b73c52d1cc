# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read of GPUs: PCI, the loaded module, nvidia-smi, holders."""

from __future__ import annotations

import json
import pathlib

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import normalise_bdf, parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_bus import architecture_of_device
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_holders import (
    container_name,
    driver_holders,
    parse_cgroup,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_host_info import gather
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import observe_gpus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import (
    observe_loaded_driver,
    parse_driver_version,
)
from driver_world import modinfo
from fake_host import FakeHost

OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (builder@)  \nGCC version: x\n"
)
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  520.56.06  Thu Oct  6 21:38:55 UTC 2022\n"


def add_gpu(
    host: FakeHost, bdf: str = "0000:00:06.0", device: str = "0x2335", pci_class: str = "0x030200", driver: str = ""
) -> None:
    base = "/sys/bus/pci/devices/%s/" % bdf
    host.files[base + "vendor"] = b"0x10de\n"
    host.files[base + "device"] = device.encode() + b"\n"
    host.files[base + "class"] = pci_class.encode() + b"\n"
    if driver:
        host.links[base + "driver"] = "../../../../bus/pci/drivers/" + driver


@pytest.mark.parametrize(
    ("device", "machine", "architecture"),
    [
        ("13c2", "x86_64", "Maxwell"),
        ("17c2", "x86_64", "Maxwell"),
        ("15f8", "x86_64", "Pascal"),
        ("1b80", "x86_64", "Pascal"),
        ("0x1db4", "x86_64", "Volta"),
        ("1eb8", "x86_64", "Turing"),
        ("2184", "x86_64", "Turing"),
        ("20b2", "x86_64", "Ampere"),
        ("2235", "x86_64", "Ampere"),
        ("25b6", "x86_64", "Ampere"),
        ("2684", "x86_64", "Ada Lovelace"),
        ("26b9", "x86_64", "Ada Lovelace"),
        ("2335", "x86_64", "Hopper"),
        ("2342", "x86_64", "Hopper"),
        ("2342", "aarch64", "Grace Hopper"),
        ("2901", "x86_64", "Blackwell"),
        ("2bb5", "x86_64", "Blackwell"),
        ("31c2", "aarch64", "Blackwell"),
        ("102d", "x86_64", "Kepler"),
        ("0611", "x86_64", ""),
        ("zzzz", "x86_64", ""),
    ],
)
def test_architecture_of_device(device: str, machine: str, architecture: str) -> None:
    assert architecture_of_device(device, machine) == architecture


def test_driver_version_texts() -> None:
    assert parse_driver_version(OPEN) == ("580.159.04", "open")
    assert parse_driver_version(CLOSED) == ("520.56.06", "proprietary")
    assert parse_driver_version("") == ("", "")
    assert parse_driver_version("NVRM version: something else\n") == ("", "")


def test_driver_version_in_the_real_capture(fixtures: pathlib.Path) -> None:
    assert parse_driver_version((fixtures / "h200-single/kernel.txt").read_text()) == ("580.159.04", "open")


def test_a_kernel_without_module_unloading_still_has_the_driver_loaded(host: FakeHost) -> None:
    # As captured: no refcnt and no holders directory.
    host.files["/sys/module/nvidia/initstate"] = b"live\n"
    host.files["/sys/module/nvidia/version"] = b"580.159.04\n"
    host.files["/proc/driver/nvidia/version"] = OPEN.encode()
    driver = observe_loaded_driver(host)
    assert driver is not None
    assert (driver.version, driver.flavour, driver.can_unload) == ("580.159.04", "open", False)
    host.files["/sys/module/nvidia/refcnt"] = b"0\n"
    driver = observe_loaded_driver(host)
    assert driver is not None
    assert driver.can_unload


def test_only_proc_modules_lists_it(host: FakeHost) -> None:
    host.files["/proc/modules"] = b"nvidia 14299136 - - Live 0xffffffffc0400000 (O)\n"
    driver = observe_loaded_driver(host)
    assert driver is not None
    assert driver.version == ""
    host.files["/proc/modules"] = b"nvidia_uvm 1 - - Live 0x0 (O)\n"
    assert observe_loaded_driver(host) is None


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("nvidia-smi/h200-x1.xml", 1),
        ("nvidia-smi/h200-x2.xml", 2),
        ("nvidia-smi/h200-x2-process.xml", 2),
        ("nvidia-smi/h200-x4-process.xml", 4),
        ("nvidia-smi/h200-x8.xml", 8),
        ("h200-single/nvidia-smi-q-x.580.159.04.h200.xml", 1),
    ],
)
def test_every_capture(fixtures: pathlib.Path, path: str, count: int) -> None:
    cuda, version, gpus = parse_smi((fixtures / path).read_text())
    assert (cuda, version) == ("13.0", "580.159.04")
    assert [gpu.index for gpu in gpus] == list(range(count))
    assert len({gpu.uuid for gpu in gpus}) == count
    for gpu in gpus:
        assert gpu.name == "NVIDIA H200"
        assert gpu.brand == "NVIDIA"
        assert gpu.architecture == "Hopper"
        assert gpu.memory_total_mib == 143771
        assert gpu.memory_free_mib is not None
        assert gpu.mig == "Disabled"
        assert gpu.compute_mode == "Default"
        assert gpu.minor is not None
        assert gpu.bdf.startswith("0000:")
        assert gpu.recovery_action == "None"
        assert gpu.mig_devices == ()
        assert gpu.fabric_state == ("Completed" if count > 1 else "")


def test_process_in_a_capture(fixtures: pathlib.Path) -> None:
    idle, busy = parse_smi((fixtures / "nvidia-smi/h200-x2-process.xml").read_text())[2]
    assert idle.processes == ()
    # CUDA opens every GPU, so there is a little memory in use on the other one too.
    assert idle.memory_used_mib == 4
    assert busy.processes == (
        {"pid": 637, "type": "C", "name": "/opt/torch/.venv/bin/python3", "used_memory_mib": 782},
    )
    assert busy.memory_used_mib == 791
    assert (busy.minor, busy.bdf) == (1, "0000:00:07.0")


def test_values_that_are_none() -> None:
    xml = """<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v13.dtd"><nvidia_smi_log>
    <driver_version>[N/A]</driver_version>
    <gpu id="00000000:3B:00.0"><product_name>NVIDIA X</product_name><uuid>Unknown Error</uuid>
      <fb_memory_usage><total>GPU requires reset</total><used>N/A</used><free>[N/A]</free></fb_memory_usage>
      <compute_mode>Requested functionality has been deprecated</compute_mode><minor_number>N/A</minor_number>
      <mig_mode><current_mig>Enabled</current_mig></mig_mode>
      <mig_devices><mig_device><index>0</index><gpu_instance_id>1</gpu_instance_id><compute_instance_id>0</compute_instance_id>
        <fb_memory_usage><total>70144 MiB</total></fb_memory_usage></mig_device></mig_devices>
      <processes><process_info><pid>812</pid><type>C</type><process_name>python3</process_name><used_memory>2 GiB</used_memory></process_info>
        <process_info><pid>N/A</pid></process_info></processes></gpu><gpu/></nvidia_smi_log>"""
    cuda, version, gpus = parse_smi(xml)
    assert (cuda, version) == ("", "")
    first, empty = gpus
    assert first.uuid == first.compute_mode == ""
    assert first.memory_total_mib is first.memory_used_mib is first.memory_free_mib is first.minor is None
    assert first.bdf == "0000:3b:00.0"
    assert first.mig_devices[0]["memory_total_mib"] == 70144
    assert first.processes[0] == {"pid": 812, "type": "C", "name": "python3", "used_memory_mib": 2048}
    assert first.processes[1]["pid"] is None
    assert empty.name == ""


def test_mig_devices_get_the_uuids_that_the_xml_lacks(host: FakeHost) -> None:
    gpu = (
        "<gpu><uuid>GPU-%s</uuid><mig_mode><current_mig>Enabled</current_mig></mig_mode><mig_devices>"
        "<mig_device><index>0</index></mig_device><mig_device><index>1</index>%s</mig_device></mig_devices></gpu>"
    )
    xml = "<nvidia_smi_log>%s%s</nvidia_smi_log>" % (gpu % ("aa", ""), gpu % ("bb", "<uuid>MIG-b1-known</uuid>"))
    host.files["/proc/driver/nvidia/version"] = b"NVRM version: NVIDIA UNIX Open Kernel Module  580.95.05  x"
    host.commands["nvidia-smi -q -x"] = xml
    host.commands["nvidia-smi -L"] = (
        "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aa)\n"
        "  MIG 3g.20gb     Device  0: (UUID: MIG-a0)\n"
        "  MIG 1c.3g.20gb  Device  1: (UUID: MIG-a1)\n"
        "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bb)\n"
        "  MIG 1g.5gb      Device  0: (UUID: MIG-b0)\n"
        "  MIG 1g.5gb      Device  1: (UUID: MIG-b1)\n"
    )
    found = [[device["uuid"] for device in gpu.mig_devices] for gpu in observe_gpus(host).gpus]
    assert found == [["MIG-a0", "MIG-a1"], ["MIG-b0", "MIG-b1-known"]]
    # Only where something is missing.
    host.calls.clear()
    host.commands["nvidia-smi -q -x"] = xml.replace("<index>", "<uuid>MIG-x</uuid><index>")
    observe_gpus(host)
    assert ("nvidia-smi", "-L") not in host.calls


@pytest.mark.parametrize(
    "text", ["", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "<nvidia_smi_log>"]
)
def test_no_xml_at_all(text: str) -> None:
    with pytest.raises(ValueError):
        parse_smi(text)


def test_bdf_forms() -> None:
    assert normalise_bdf("00000000:00:06.0") == "0000:00:06.0"
    assert normalise_bdf("0000:3B:00.0") == "0000:3b:00.0"
    assert normalise_bdf("00010000:03:00.0") == "0000:03:00.0"
    assert normalise_bdf("0:03:00.0") == "0000:03:00.0"


def test_inventory_without_a_driver(host: FakeHost) -> None:
    add_gpu(host, driver="nouveau")
    add_gpu(host, "0000:01:00.0", "0x22a3", "0x068000")
    add_gpu(host, "0000:02:00.0", "0x10f0", "0x040300")  # the audio function of a GPU
    host.files["/sys/bus/pci/devices/0000:03:00.0/vendor"] = b"0x8086\n"
    host.files["/sys/bus/pci/devices/0000:03:00.0/class"] = b"0x030000\n"
    host.commands["nvidia-smi*"] = "must not be asked"
    inventory = observe_gpus(host)
    assert [(gpu.bdf, gpu.device_id, gpu.architecture, gpu.bound) for gpu in inventory.pci] == [
        ("0000:00:06.0", "2335", "Hopper", "nouveau")
    ]
    assert inventory.nvswitches == 1
    assert inventory.needs_fabric_manager
    assert inventory.driver is None
    assert host.calls == []


def test_inventory_with_a_driver(host: FakeHost, fixtures: pathlib.Path) -> None:
    add_gpu(host, driver="nvidia")
    host.files["/proc/driver/nvidia/version"] = OPEN.encode()
    host.commands["nvidia-smi -q -x"] = (fixtures / "nvidia-smi/h200-x1.xml").read_text()
    inventory = observe_gpus(host)
    assert inventory.cuda_version == "13.0"
    assert inventory.gpus[0].uuid == "GPU-00000000-0000-0000-0000-000000000001"
    assert inventory.smi_error == ""
    assert inventory.architectures == ("Hopper",)


def test_a_mismatch_leaves_names_and_uuids(host: FakeHost) -> None:
    add_gpu(host, driver="nvidia")
    host.files["/proc/driver/nvidia/version"] = OPEN.encode()
    host.files["/proc/driver/nvidia/gpus/0000:00:06.0/information"] = (
        b"Model: \t\t NVIDIA H200\nIRQ:   \t\t 41\nGPU UUID: \t GPU-1\nDevice Minor: \t 0\n"
    )
    host.commands["nvidia-smi -q -x"] = (18, "Failed to initialize NVML: Driver/library version mismatch\n", "")
    inventory = observe_gpus(host)
    assert inventory.smi_error == "Failed to initialize NVML: Driver/library version mismatch"
    assert (inventory.gpus[0].name, inventory.gpus[0].uuid, inventory.gpus[0].minor) == ("NVIDIA H200", "GPU-1", 0)
    assert inventory.gpus[0].architecture == "Hopper"
    assert inventory.gpus[0].memory_total_mib is None


def test_nvlink5_and_grace_blackwell(host: FakeHost) -> None:
    add_gpu(host, device="0x2941")
    host.files["/sys/class/infiniband/mlx5_0/device/vpd"] = b"\x82\x10\x00xSW_MNGx"
    inventory = observe_gpus(host)
    assert inventory.nvlink5
    assert inventory.imex
    assert inventory.needs_fabric_manager


CONTAINER = "8e1f" * 16


@pytest.mark.parametrize(
    ("text", "unit", "container"),
    [
        ("0::/system.slice/docker-%s.scope\n" % CONTAINER, "docker-%s.scope" % CONTAINER, CONTAINER),
        ("12:devices:/docker/%s\n0::/system.slice/docker.service\n" % CONTAINER, "docker.service", CONTAINER),
        ("0::/system.slice/nvidia-persistenced.service\n", "nvidia-persistenced.service", ""),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope", ""),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/jupyter.service\n", "jupyter.service", ""),
        ("0::/\n", "", ""),
        ("", "", ""),
    ],
)
def test_cgroups(text: str, unit: str, container: str) -> None:
    assert parse_cgroup(text) == (unit, container)


def test_holders(host: FakeHost) -> None:
    host.links["/proc/812/fd/3"] = "/dev/nvidia0"
    host.links["/proc/812/fd/4"] = "/dev/nvidia-uvm"
    host.files["/proc/812/cmdline"] = b"python3\0serve.py\0--api-key=secret\0"
    host.files["/proc/812/cgroup"] = b"0::/system.slice/docker-%s.scope\n" % CONTAINER.encode()
    host.files["/var/lib/docker/containers/%s/config.v2.json" % CONTAINER] = json.dumps({"Name": "/nim-llama"}).encode()
    host.links["/proc/90/fd/0"] = "/dev/null"
    host.links["/proc/91/fd/5"] = "/dev/nvidia-caps/nvidia-cap1"
    host.files["/proc/91/comm"] = b"nvidia-persiste\n"
    host.files["/proc/91/cgroup"] = b"0::/system.slice/nvidia-persistenced.service\n"
    host.links["/proc/92/fd/5"] = "/dev/dri/card1"
    host.links["/proc/93/fd/5"] = "/dev/dri/card0"
    host.links["/sys/class/drm/card1/device/driver"] = "../../bus/pci/drivers/nvidia"
    host.links["/sys/class/drm/card0/device/driver"] = "../../bus/pci/drivers/ast"
    host.links["/proc/self/fd/3"] = "/dev/nvidia0"
    holders = driver_holders(host)
    assert [holder.pid for holder in holders] == [91, 92, 812]
    assert holders[2].devices == ("/dev/nvidia-uvm", "/dev/nvidia0")
    assert holders[2].describe() == "pid 812 (python3) in container nim-llama"
    assert "secret" not in str(holders[2].as_dict())
    assert holders[0].describe() == "pid 91 (nvidia-persiste) of unit nvidia-persistenced.service"


def test_the_name_of_a_container_where_dockers_data_root_was_moved(host: FakeHost) -> None:
    host.files["/etc/docker/daemon.json"] = b'{"data-root": "/data/docker/"}'
    host.files["/data/docker/containers/%s/config.v2.json" % CONTAINER] = json.dumps({"Name": "/nim-llama"}).encode()
    assert container_name(host, CONTAINER) == "nim-llama"
    host.files["/etc/docker/daemon.json"] = b'{"data-root": 5}'
    assert container_name(host, CONTAINER) == ""


def test_info_on_a_bare_host(host: FakeHost) -> None:
    host.files["/etc/os-release"] = b"ID=debian\nVERSION_ID=12\nVERSION_CODENAME=bookworm\n"
    answer = gather(host)
    assert answer["errors"] == {}
    assert answer["os"]["id"] == "debian"
    assert answer["driver"]["loaded"] == ""
    assert answer["gpus"] == answer["pci_gpus"] == answer["holders"] == []
    assert set(gather(host, ["holders"])) == {"holders", "errors"}


def test_info_on_an_unknown_system_says_so_and_goes_on(host: FakeHost) -> None:
    answer = gather(host)
    assert "system" in answer["errors"]
    assert answer["pci_gpus"] == []
    assert "cuda_version" in answer


def test_info_with_a_driver(host: FakeHost, fixtures: pathlib.Path) -> None:
    host.files["/etc/os-release"] = b"ID=ubuntu\nVERSION_ID=24.04\nVERSION_CODENAME=noble\nID_LIKE=debian\n"
    add_gpu(host, driver="nvidia")
    host.files["/proc/driver/nvidia/version"] = OPEN.encode()
    host.commands["nvidia-smi -q -x"] = (fixtures / "nvidia-smi/h200-x8.xml").read_text()
    host.commands["modinfo *"] = modinfo("580.159.04", "Dual MIT/GPL")
    host.commands["dkms status"] = "nvidia/580.159.04, 6.1.0-test-amd64, x86_64: installed\nzfs/2.2: added\n"
    answer = gather(host)
    json.dumps(answer)
    assert answer["cuda_version"] == "13.0"
    assert answer["driver"]["on_disk"] == "580.159.04"
    assert answer["driver"]["dkms"] == ["nvidia/580.159.04, 6.1.0-test-amd64, x86_64: installed"]
    assert answer["fabric"]["states"] == ["Completed"] * 8
    assert answer["mig"] == {"enabled": False, "devices": {}}
