# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reloading the driver: order, refusals, restoring, reboots."""

from __future__ import annotations

import json
import pathlib

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_clients import CLIENT_UNITS, RECORD, in_use_message
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_swap import load_failure
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_holders import Holder
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import ModuleFile
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_reload import DriverReload
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_reload_planner import REBOOT_MARKER
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_state import module_on_disk, on_disk_version
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption, Outcome, converge
from driver_world import KERNEL, DriverWorld, modinfo
from fake_host import FakeHost


@pytest.fixture
def world() -> DriverWorld:
    world = DriverWorld()
    world.install_driver("580.95.05")
    return world


def outdated(world: DriverWorld) -> DriverWorld:
    """An older module is loaded than is installed, and two services of the driver run."""
    world.load("580.65.06")
    world.unit_state = {
        "nvidia-cdi-refresh.path": ["active", "enabled"],
        "nvidia-dcgm.service": ["active", "enabled"],
        "nvidia-fabricmanager.service": ["inactive", "disabled"],
        "nvidia-persistenced.service": ["active", "enabled"],
        "dcgm-exporter.service": ["inactive", "enabled"],
    }
    return world


def run(world: DriverWorld, *, check: bool = False, **options: object) -> tuple[Outcome, DriverReload]:  # type: ignore[type-arg]
    resource = DriverReload(**options)  # type: ignore[arg-type]
    return converge(world, resource, check_mode=check), resource


def test_nothing_to_do(world: DriverWorld) -> None:
    outcome, resource = run(world, expected_version="580")
    assert not outcome.changed
    answer = resource.result(outcome.state)
    assert answer["message"] == "Driver 580.95.05: loaded = on disk = user space."
    assert not answer["reboot_required"]
    assert answer["flavour"] == "open"


def test_no_gpu() -> None:
    outcome, resource = run(DriverWorld(gpus=0))
    assert not outcome.changed
    assert resource.result(outcome.state)["message"] == "This host has no NVIDIA GPU; nothing was done."


def test_first_load(world: DriverWorld) -> None:
    world.remove("/proc/driver/nvidia")
    world.remove("/sys/module")
    planned, _resource = run(world, check=True)
    assert planned.changes[0].disruption == Disruption.NONE
    assert world.ran("modprobe") == []
    outcome, _resource = run(world)
    assert outcome.changed
    assert outcome.state.loaded_version == "580.95.05"
    assert world.ran("^modprobe")[:2] == ["modprobe nvidia", "modprobe nvidia_uvm"]
    assert not run(world)[0].changed


def test_swap_in_order_and_restored_exactly(world: DriverWorld) -> None:
    outdated(world)
    planned, _resource = run(world, check=True)
    assert planned.changes[0].disruption == Disruption.UNLOAD_DRIVER
    assert (planned.changes[0].before, planned.changes[0].after) == ("580.65.06", "580.95.05")
    outcome, _resource = run(world)
    assert outcome.state.loaded_version == "580.95.05"
    assert world.ran("^(systemctl (stop|start)|rmmod|modprobe)") == [
        "systemctl stop nvidia-cdi-refresh.path",
        "systemctl stop nvidia-dcgm.service",
        "systemctl stop nvidia-persistenced.service",
        "rmmod nvidia_modeset",
        "rmmod nvidia_uvm",
        "rmmod nvidia",
        "modprobe nvidia",
        "modprobe nvidia_uvm",
        "modprobe nvidia_uvm",
        "modprobe nvidia_modeset",
        "systemctl start nvidia-persistenced.service",
        "systemctl start nvidia-dcgm.service",
        "systemctl start nvidia-cdi-refresh.path",
    ]
    assert RECORD not in world.files
    assert world.unit_state["dcgm-exporter.service"][0] == "inactive"
    assert not run(world)[0].changed


@pytest.mark.parametrize("unit", ["nim-llama.service", "session-3.scope", "docker-%s.scope" % ("ab" * 32)])
def test_a_stranger_is_never_stopped(world: DriverWorld, unit: str) -> None:
    outdated(world)
    world.hold_gpu(812, unit, "/opt/serve")
    for check in (True, False):
        outcome, resource = run(world, check=check)
        assert not outcome.changed
        assert outcome.blocked[0].blocked is not None
        with pytest.raises(FleetError) as caught:
            resource.result(outcome.state)
        assert caught.value.reason == "gpu_in_use"
        assert "pid 812 (/opt/serve)" in caught.value.message
        assert caught.value.facts["holders"][0]["unit"] == unit
    assert world.ran("systemctl stop|rmmod|kill") == []


def test_a_service_of_the_driver_inside_a_container_is_a_stranger(world: DriverWorld) -> None:
    outdated(world)
    world.hold_gpu(812, "nvidia-dcgm.service")
    world.files["/proc/812/cgroup"] = b"1:devices:/docker/%s\n0::/system.slice/nvidia-dcgm.service\n" % (b"ab" * 32)
    outcome, resource = run(world)
    with pytest.raises(FleetError, match="in container abababababab"):
        resource.result(outcome.state)


def test_somebody_arrives_while_the_services_stop(world: DriverWorld) -> None:
    outdated(world)

    def stop(*arguments: object) -> object:
        world.hold_gpu(812, "late.service")
        return world._systemctl(*arguments)  # type: ignore[arg-type]

    world.commands = {"systemctl stop nvidia-dcgm.service": stop, **world.commands}
    with pytest.raises(FleetError, match=r"late\.service"):
        run(world)
    assert world.unit_state["nvidia-persistenced.service"][0] == "active"
    assert world.unit_state["nvidia-cdi-refresh.path"][0] == "active"
    assert world.ran("rmmod") == []


def test_who_arrived_is_named_also_where_a_service_refuses_the_old_module(world: DriverWorld) -> None:
    outdated(world)
    real = world._systemctl

    def systemctl(host: object, argv: tuple[str, ...], stdin: object, env: object) -> object:
        if argv[1] == "stop":
            world.hold_gpu(812, "late.service")
        if tuple(argv[1:]) == ("start", "nvidia-persistenced.service"):
            return (1, "", "Job for nvidia-persistenced.service failed.")
        return real(host, argv, stdin, env)

    world.commands["systemctl *"] = systemctl
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason == "gpu_in_use" and "late.service" in caught.value.message


def test_a_service_that_does_not_stop(world: DriverWorld) -> None:
    outdated(world)
    world.refuses["nvidia-persistenced.service"] = "Job canceled."
    real = world._systemctl

    def systemctl(host: object, argv: tuple[str, ...], stdin: object, env: object) -> object:
        if argv[1] == "start":
            world.refuses = {}
        return real(host, argv, stdin, env)

    world.commands["systemctl *"] = systemctl
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason == "client_not_stopped"
    assert "nvidia-persistenced.service" in caught.value.message
    assert world.unit_state["nvidia-dcgm.service"][0] == "active"


# -- reboots


def test_kernel_without_module_unloading(world: DriverWorld) -> None:
    outdated(world)
    for name in ("nvidia", "nvidia_uvm", "nvidia_modeset"):
        world.remove("/sys/module/%s/refcnt" % name)
    outcome, resource = run(world)
    assert not outcome.changed
    answer = resource.result(outcome.state)
    assert answer["reboot_required"]
    assert answer["reboot_reason"] == "the running kernel %s was built without module unloading" % KERNEL
    assert "580.95.05 is installed but 580.65.06 is loaded" in answer["message"]
    assert world.ran("systemctl stop") == []


def test_a_stranger_also_stops_a_reboot(world: DriverWorld) -> None:
    outdated(world)
    world.remove("/sys/module/nvidia/refcnt")
    world.hold_gpu(812, "nim-llama.service")
    outcome, resource = run(world)
    with pytest.raises(FleetError, match=r"nim-llama\.service"):
        resource.result(outcome.state)
    with pytest.raises(FleetError, match="Rebooting would take the GPU away"):
        run(world, prepare_reboot=True)


@pytest.mark.parametrize(
    ("module", "setup", "reason"),
    [
        ("nvidia_uvm", {}, "kernel module nvidia_uvm cannot be unloaded: rmmod: ERROR: Module is in use"),
        ("nvidia_modeset", {"/sys/module/nvidia_modeset/refcnt": b"2\n"}, "the console runs on the GPU's frame buffer"),
        ("nvidia", {"/sys/module/nvidia/holders/gdrdrv2/x": b""}, "cannot be unloaded, the modules gdrdrv2 use it"),
    ],
)
def test_a_module_that_stays(world: DriverWorld, module: str, setup: dict[str, bytes], reason: str) -> None:
    outdated(world)
    world.files.update(setup)
    world.refuses[module] = "Module is in use"
    outcome, resource = run(world)
    answer = resource.result(outcome.state)
    assert answer["reboot_required"]
    assert reason in answer["reboot_reason"]
    assert world.unit_state["nvidia-persistenced.service"][0] == "active"
    # What was taken out before is back.
    for earlier in world.ran("^rmmod")[:-1]:
        assert "modprobe " + earlier.split()[1] in world.ran("^modprobe")


def test_a_module_that_stays_while_a_service_is_of_the_new_driver_already(world: DriverWorld) -> None:
    outdated(world)
    world.refuses["nvidia"] = "Module nvidia is in use"
    real = world._systemctl

    def systemctl(host: object, argv: tuple[str, ...], stdin: object, env: object) -> object:
        if tuple(argv[1:]) == ("start", "nvidia-persistenced.service") and world.refuses:
            return (1, "", "Job for nvidia-persistenced.service failed.")
        return real(host, argv, stdin, env)

    world.commands["systemctl *"] = systemctl
    outcome, resource = run(world)
    answer = resource.result(outcome.state)
    # That it does not run with the old module is no news: the reboot starts it.
    assert answer["reboot_required"] and "cannot be unloaded" in answer["reboot_reason"]
    states = {unit: state for unit, (state, _enabled) in world.unit_state.items()}
    assert (states["nvidia-dcgm.service"], states["nvidia-persistenced.service"]) == ("active", "inactive")
    # Not forgotten either, should the old module go without one.
    world.refuses = {}
    assert run(world)[0].state.loaded_version == "580.95.05"
    assert world.unit_state["nvidia-persistenced.service"][0] == "active"
    assert RECORD not in world.files


def test_nouveau(world: DriverWorld) -> None:
    world.remove("/proc/driver/nvidia")
    world.remove("/sys/module")
    world.files["/sys/module/nouveau/refcnt"] = b"4\n"
    world.refuses["nouveau"] = "Module nouveau is in use"
    outcome, resource = run(world)
    assert resource.result(outcome.state)["reboot_reason"].startswith("nouveau drives the GPU and cannot be unloaded")
    world.refuses = {}
    outcome, resource = run(world)
    assert outcome.state.loaded_version == "580.95.05"
    assert not outcome.state.nouveau_loaded


def test_a_rejected_signature(world: DriverWorld) -> None:
    world.remove("/proc/driver/nvidia")
    world.remove("/sys/module")
    world.load_error = "Key was rejected by service"
    outcome, resource = run(world)
    answer = resource.result(outcome.state)
    assert answer["reboot_required"]
    assert "enrol the key" in answer["reboot_reason"]


def test_the_wrong_flavour_is_not_mended_by_a_reboot(world: DriverWorld) -> None:
    world.remove("/proc/driver/nvidia")
    world.remove("/sys/module")
    world.load_error = "No such device"
    world.kernel_log = "NVRM: The NVIDIA GPU 0000:00:06.0 is not supported by open nvidia.ko because it does not include the required GPU\n"
    with pytest.raises(FleetError, match="nvidia_driver_flavour to proprietary"):
        run(world)


@pytest.mark.parametrize(
    ("said", "log", "words", "helps"),
    [
        ("modprobe: ERROR: could not insert 'nvidia': Required key not available", "", "enrol the key", True),
        (
            "modprobe: FATAL: Module nvidia not found in directory /lib/modules/6.8",
            "",
            "no module for the running kernel",
            True,
        ),
        (
            "could not insert 'nvidia': No such device",
            "NVRM: GPU fell off\n",
            "no GPU answered the driver: NVRM: GPU fell off",
            True,
        ),
        ("could not insert", "NVRM: requires use of the NVIDIA open kernel modules\n", "flavour to open", False),
        ("Exec format error.", "", "Exec format error", True),
    ],
)
def test_why_it_does_not_load(host: FakeHost, said: str, log: str, words: str, helps: bool) -> None:
    host.commands["journalctl *"] = log
    cause, reboot_helps = load_failure(host, "6.8", said)
    assert words in cause
    assert reboot_helps is helps


def test_a_reboot_once_per_target(world: DriverWorld) -> None:
    outdated(world)
    outcome, _resource = run(world, prepare_reboot=True, reboot_reason="no unloading")
    assert outcome.changed
    marker = json.loads(world.files[REBOOT_MARKER])
    assert marker["target"] == "580.95.05"
    assert marker["reason"] == "no unloading"
    assert marker["boot_id"] == "boot-1"
    # The reboot never came: it may still be tried, and the marker is not written twice.
    assert not run(world, prepare_reboot=True)[0].changed
    # It came, and the driver is still not loaded.
    world.files["/proc/sys/kernel/random/boot_id"] = b"boot-2\n"
    with pytest.raises(FleetError) as caught:
        run(world, prepare_reboot=True)
    assert caught.value.reason == "rebooted_once"
    assert "no unloading" in caught.value.message
    assert REBOOT_MARKER in caught.value.message
    # Another target may reboot again.
    world.install_driver("580.82.07", loaded=False)
    assert run(world, prepare_reboot=True)[0].changed
    # Success takes the marker away.
    world.load("580.82.07")
    assert run(world)[0].changed
    assert REBOOT_MARKER not in world.files
    assert not run(world)[0].changed
    assert not run(world, prepare_reboot=True)[0].changed


# -- the other flavour of the same version


def test_the_other_flavour_is_another_module(world: DriverWorld) -> None:
    world.flavour = "proprietary"
    planned, _resource = run(world, check=True)
    [change] = planned.changes
    assert change.disruption == Disruption.UNLOAD_DRIVER
    assert (change.before, change.after) == ("580.95.05 (open)", "580.95.05 (proprietary)")
    outcome, resource = run(world)
    assert outcome.changed
    answer = resource.result(outcome.state)
    assert (answer["flavour"], answer["message"]) == (
        "proprietary",
        "Driver 580.95.05: loaded = on disk = user space.",
    )
    assert not run(world)[0].changed


def test_a_module_of_the_other_flavour_that_stays_needs_a_reboot(world: DriverWorld) -> None:
    world.flavour = "proprietary"
    world.refuses["nvidia"] = "Module nvidia is in use"
    for _again in range(2):
        outcome, resource = run(world)
        answer = resource.result(outcome.state)
        assert answer["reboot_required"]
        assert (
            "580.95.05 (proprietary) is installed but 580.95.05 (open) is loaded: a reboot is needed"
            in answer["message"]
        )
    assert run(world, prepare_reboot=True, reboot_reason="in use")[0].changed
    world.files["/proc/sys/kernel/random/boot_id"] = b"boot-2\n"
    with pytest.raises(
        FleetError, match=r"for driver 580\.95\.05 \(proprietary\) .*, yet 580\.95\.05 \(open\) is loaded"
    ):
        run(world, prepare_reboot=True)
    world.load("580.95.05")
    assert [change.action for change in run(world)[0].changes] == ["clear_marker"]


@pytest.mark.parametrize(("memory", "disk"), [("open", ""), ("", "open"), ("", "")])
def test_a_flavour_that_is_not_told_is_no_difference(world: DriverWorld, memory: str, disk: str) -> None:
    world.flavour = disk
    if memory == "":
        world.files["/proc/driver/nvidia/version"] = b"NVRM version: NVIDIA UNIX  580.95.05  \n"
    outcome, resource = run(world)
    assert not outcome.changed
    assert resource.result(outcome.state)["message"] == "Driver 580.95.05: loaded = on disk = user space."


@pytest.mark.parametrize("content", [b"{broken", b"[]", b"{}", b'{"target": 580, "boot_id": "1"}'])
def test_a_broken_marker_is_reported_and_left(world: DriverWorld, content: bytes) -> None:
    world.files[REBOOT_MARKER] = content
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason == "state_unreadable"
    assert world.files[REBOOT_MARKER] == content


# -- trouble with packages


def test_versions_that_do_not_agree(world: DriverWorld) -> None:
    world.module = "580.65.06"
    with pytest.raises(FleetError, match=r"module on disk is 580\.65\.06 but the user-space driver is 580\.95\.05"):
        run(world)
    world.module = ""
    with pytest.raises(FleetError, match="no NVIDIA kernel module for the running kernel"):
        run(world)


def test_expected_version(world: DriverWorld) -> None:
    run(world, expected_version="580.95.05")
    with pytest.raises(FleetError, match=r"on disk is 580\.95\.05 but 570 is wanted"):
        run(world, expected_version="570")
    with pytest.raises(FleetError, match="not a driver branch or version"):
        DriverReload(expected_version="latest")


def test_debians_own_module_name(host: FakeHost) -> None:
    host.commands["modinfo * nvidia-current"] = modinfo("535.261.03", "NVIDIA")
    assert module_on_disk(host, "k") == ModuleFile("535.261.03", "proprietary")
    assert on_disk_version(host, "k") == "535.261.03"
    # Of another maker's words nothing is concluded.
    for licence in ("", "GPL", "Proprietary"):
        host.commands = {"modinfo * nvidia": modinfo("580.95.05", licence)}
        assert module_on_disk(host, "k") == ModuleFile("580.95.05", "")
    for text in ("garbage\n", "srcversion: 580.95.05\nlicense: NVIDIA\n", "version: none\n"):
        host.commands = {"modinfo *": text}
        assert module_on_disk(host, "k") == ModuleFile("", "")
        assert on_disk_version(host, "k") == ""


def test_one_question_tells_version_and_flavour(host: FakeHost) -> None:
    host.commands["modinfo *"] = modinfo("580.95.05", "Dual MIT/GPL")
    assert module_on_disk(host, "k") == ModuleFile("580.95.05", "open")
    assert host.calls == [("modinfo", "-k", "k", "nvidia")]


# -- services


def test_services_left_stopped_by_an_earlier_run(world: DriverWorld) -> None:
    world.files[RECORD] = json.dumps({"units": ["nvidia-dcgm.service", "evil.service"]}).encode()
    outcome, _resource = run(world)
    assert outcome.changes[0].action == "start_clients"
    assert world.unit_state["nvidia-dcgm.service"][0] == "active"
    assert "evil.service" not in world.unit_state
    assert not run(world)[0].changed


def test_a_broken_record_is_as_good_as_none(world: DriverWorld) -> None:
    world.files[RECORD] = b"{"
    assert not run(world)[0].changed


def test_daemons_that_are_enabled_run(world: DriverWorld) -> None:
    world.unit_state["nvidia-persistenced.service"] = ["failed", "enabled"]
    outcome, _resource = run(world)
    assert outcome.changed
    assert world.unit_state["nvidia-persistenced.service"][0] == "active"
    world.unit_state["nvidia-persistenced.service"] = ["inactive", "disabled"]
    assert not run(world)[0].changed


def test_a_service_that_does_not_start_again(world: DriverWorld) -> None:
    world.unit_state["nvidia-persistenced.service"] = ["failed", "enabled"]
    world.refuses["nvidia-persistenced.service"] = "Job for nvidia-persistenced.service failed."
    world.kernel_log = "Failed to query NVIDIA devices.\n"
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason == "client_not_started"
    assert "Failed to query NVIDIA devices." in caught.value.message


def test_the_fabric_is_waited_for(world: DriverWorld, fixtures: pathlib.Path) -> None:
    for name, value in (("vendor", b"0x10de\n"), ("class", b"0x068000\n")):
        world.files["/sys/bus/pci/devices/0000:c0:00.0/" + name] = value
    outdated(world)
    ready = (fixtures / "nvidia-smi/h200-x8.xml").read_text()
    answers = [ready.replace("<state>Completed</state>", "<state>In Progress</state>")] * 3 + [ready]
    world.commands["nvidia-smi *"] = lambda *_arguments: answers.pop(0)
    started = world.monotonic()
    run(world)
    assert 0 < world.monotonic() - started < 20

    outdated(world)
    world.commands["nvidia-smi *"] = ready.replace("<state>Completed</state>", "<state>In Progress</state>")
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason == "fabric_not_ready"
    assert "In Progress" in caught.value.message


def test_gpus_before_hopper_have_no_fabric_to_wait_for(world: DriverWorld, fixtures: pathlib.Path) -> None:
    """DGX A100: NVSwitches, and "N/A" where a newer GPU tells how far it has joined."""
    for name, value in (("vendor", b"0x10de\n"), ("class", b"0x068000\n")):
        world.files["/sys/bus/pci/devices/0000:c0:00.0/" + name] = value
    outdated(world)
    answer = (fixtures / "nvidia-smi/h200-x8.xml").read_text().replace("<state>Completed</state>", "<state>N/A</state>")
    world.commands["nvidia-smi *"] = answer
    began = world.monotonic()
    run(world)
    assert world.monotonic() - began < 20


def joining(world: DriverWorld, fixtures: pathlib.Path, rounds: int, age: float = 20.0) -> None:
    """After a boot: Fabric Manager has run for so many seconds, and the GPUs have joined after some looks."""
    for name, value in (("vendor", b"0x10de\n"), ("class", b"0x068000\n")):
        world.files["/sys/bus/pci/devices/0000:c0:00.0/" + name] = value
    world.install_driver("580.95.05")
    ready = (fixtures / "nvidia-smi/h200-x8.xml").read_text()
    left = [ready.replace("<state>Completed</state>", "<state>In Progress</state>", 3)] * rounds
    world.commands["nvidia-smi *"] = lambda *_arguments: left.pop() if left else ready
    entered = (world.monotonic() - age) * 1e6
    world.commands = {
        "systemctl show * nvidia-fabricmanager.service": (
            "ActiveState=active\nUnitFileState=enabled\nActiveEnterTimestampMonotonic=%d\n" % entered
        ),
        **world.commands,
    }
    world.unit_state["nvidia-persistenced.service"] = ["active", "enabled"]


def test_after_a_boot_the_fabric_is_waited_for(world: DriverWorld, fixtures: pathlib.Path) -> None:
    joining(world, fixtures, rounds=5)
    (change,) = DriverReload().plan(DriverReload().observe(world))
    assert (change.what, change.before, change.after, change.disruption) == (
        "NVLink fabric",
        "In Progress",
        "Completed",
        Disruption.NONE,
    )
    began = world.monotonic()
    outcome, resource = run(world)
    assert [change.what for change in outcome.changes] == ["NVLink fabric"]
    assert 0 < world.monotonic() - began < 20 and "warnings" not in resource.result(outcome.state)
    assert run(world)[0].changes == []


def test_a_fabric_that_does_not_come_about_is_left_to_the_verdicts(world: DriverWorld, fixtures: pathlib.Path) -> None:
    joining(world, fixtures, rounds=1000)
    began = world.monotonic()
    outcome, resource = run(world)
    assert 120 <= world.monotonic() - began < 130
    (warning,) = resource.result(outcome.state)["warnings"]
    assert "After 120 seconds the NVLink fabric is In Progress instead of Completed" in warning
    # Fabric Manager has run for long: waiting does not help any more.
    began = world.monotonic()
    assert run(world)[0].changes == [] and world.monotonic() == began


def test_a_fabric_manager_that_still_starts(world: DriverWorld, fixtures: pathlib.Path) -> None:
    joining(world, fixtures, rounds=3, age=500)
    assert DriverReload().plan(DriverReload().observe(world)) == []
    world.commands["systemctl show * nvidia-fabricmanager.service"] = "ActiveState=activating\nUnitFileState=enabled\n"
    assert [change.what for change in DriverReload().plan(DriverReload().observe(world))] == ["NVLink fabric"]
    # Who has no Fabric Manager of its own has been at it since the boot.
    world.commands["systemctl show * nvidia-fabricmanager.service"] = "ActiveState=inactive\n"
    assert DriverReload().plan(DriverReload().observe(world)) == []
    world.clock = 60.0
    assert [change.what for change in DriverReload().plan(DriverReload().observe(world))] == ["NVLink fabric"]


def test_stop_order_is_the_documented_one() -> None:
    order = [
        "nvidia-cdi-refresh.path",
        "nvidia-dcgm.service",
        "nvidia-imex.service",
        "nvidia-fabricmanager.service",
        "nvidia-persistenced.service",
    ]
    assert [unit for unit in CLIENT_UNITS if unit in order] == order


def test_a_module_that_loads_only_after_its_reboot_ends_the_record_of_it(world: DriverWorld) -> None:
    """The boot had not loaded it; what kept it away was mended by hand, and the role runs again."""
    outdated(world)
    run(world, prepare_reboot=True)
    world.files["/proc/sys/kernel/random/boot_id"] = b"boot-2\n"
    outcome, _resource = run(world)
    assert outcome.state.loaded_version == "580.95.05"
    assert REBOOT_MARKER not in world.files


def test_who_is_in_the_way_is_named_with_what_helps() -> None:
    nim = Holder(812, "python3", "", "c1", "nim-llama")
    other = Holder(900, "train.py", "train.service", "", "")
    said = in_use_message([nim], "Changing the driver packages")
    assert "stop it (systemctl stop nim-llama) and run again, or use playbook gpu_fleet.nim.upgrade_drivers" in said
    said = in_use_message([nim, other], "Changing the driver packages")
    assert "of unit train.service" in said and said.endswith("stop them (systemctl stop nim-llama) and run again.")
