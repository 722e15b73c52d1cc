# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Driver upgrades on hosts as they are at night: with monitoring, Docker elsewhere, more modules, full disks."""

from __future__ import annotations

import json
import re
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _driver_upgrade
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade_record import RECORD
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import MAINTENANCE_FILE
from driver_world import KERNEL
from upgrade_world import UpgradeWorld, call, install_fakes, record_of, roll


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> UpgradeWorld:
    made = UpgradeWorld()
    install_fakes(monkeypatch, made)
    return made


def test_without_a_reboot_a_kernel_that_cannot_unload_is_refused_while_it_serves(world: UpgradeWorld) -> None:
    world.can_unload = False
    world.load("555.42.06")
    world.remove("/sys/module/nvidia/refcnt")
    for check_mode in (True, False):
        with pytest.raises(FleetError, match="set driver_upgrade_reboot to auto") as caught:
            call(world, "prestaged", reboot="never", check_mode=check_mode)
        assert caught.value.reason == "reboot_needed" and "outcome" not in caught.value.facts
    assert world.serves() and not world.ran(r"systemctl (stop|start)|rmmod|modprobe|--download-only")


def test_after_a_boot_docker_is_waited_for(world: UpgradeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no container would be tried: sshd answers before Docker does."""
    tried = []
    monkeypatch.setattr(_driver_upgrade, "run_gpu_container", lambda *_: tried.append(world.clock))
    call(world, "prestaged", reboot="always")
    call(world, "drained", reboot="always")
    call(world, "ready", reboot="always")
    world.reboot()
    booted = world.clock
    monkeypatch.setattr(world.docker, "available", lambda: world.clock >= booted + 30)
    call(world, "ready", reboot="always")
    assert tried == [booted + 30] and world.serves()


def test_without_docker_the_services_cannot_be_proved(world: UpgradeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    call(world, "prestaged")
    call(world, "drained")
    monkeypatch.setattr(world.docker, "available", lambda: world.loaded != "580.95.05")
    with pytest.raises(FleetError, match="Docker does not answer after 120 seconds") as caught:
        call(world, "ready")
    assert caught.value.facts["outcome"] == "rolled_back" and world.serves()


def test_a_boot_that_brings_the_old_module_back_is_no_reason_for_another(world: UpgradeWorld) -> None:
    """Out of an initial RAM disk that nobody has made anew."""
    call(world, "prestaged", reboot="always")
    call(world, "drained", reboot="always")
    assert call(world, "ready", reboot="always")[1]["reboot_required"]
    world.reboot()
    world.load("555.42.06")
    assert not call(world, "ready", reboot="always")[1]["reboot_required"]
    call(world, "returned", reboot="always")
    assert world.serves() and world.loaded == "580.95.05"


def test_own_containers_are_known_wherever_docker_keeps_its_data(world: UpgradeWorld) -> None:
    container = "c" * 64
    world.hold_gpu(700, "docker-%s.scope" % container)
    world.docker.ids["nim-llama"] = container
    call(world, "prestaged")
    world.docker.ids = {"notebook": container}
    world.docker.strangers["notebook"] = {}
    with pytest.raises(FleetError, match=r"pid 700 \(python3\) in container notebook"):
        call(world, "prestaged", "595")


def test_a_look_of_monitoring_at_the_gpus_is_no_reason_to_stop(world: UpgradeWorld) -> None:
    """A process that is there at one look and gone at the next, under another number every time."""
    pids = iter(range(900, 999))
    scan = world.list_dir

    def passing(path: str) -> list[str]:
        if path == "/proc":
            for link in [link for link in world.links if link.startswith("/proc/9")]:
                del world.links[link]
            world.hold_gpu(next(pids), "cron.service", "nvidia-smi")
        return scan(path)

    world.list_dir = passing  # type: ignore[method-assign]  # what cron does is no file
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"


@pytest.mark.parametrize("times, outcome", [(2, None), (3, "rolled_back")])
def test_a_look_of_monitoring_at_a_driver_that_stays_loaded(
    world: UpgradeWorld, monkeypatch: pytest.MonkeyPatch, times: int, outcome: str | None
) -> None:
    """Until a reboot the packages are changed under it, and that is refused while somebody uses a GPU."""
    world.can_unload = False
    world.load("555.42.06")
    world.remove("/sys/module/nvidia/refcnt")
    call(world, "prestaged")
    call(world, "drained")
    converge, refusals = _driver_upgrade.converge, [0]

    def refused(host: t.Any, resource: t.Any, **more: t.Any) -> t.Any:
        if resource.name == "nvidia_driver" and refusals[0] < times:
            refusals[0] += 1
            raise FleetError("gpu_in_use", "Changing the driver packages would take the GPU away from pid 812.")
        return converge(host, resource, **more)

    monkeypatch.setattr(_driver_upgrade, "converge", refused)
    if outcome is None:
        assert call(world, "ready")[1]["reboot_required"]
    else:
        with pytest.raises(FleetError) as caught:
            call(world, "ready")
        assert caught.value.reason == "gpu_in_use" and caught.value.facts["outcome"] == outcome
        assert world.serves()


@pytest.mark.parametrize("version", ["555.42.06", "580.95.05"])
def test_a_module_that_was_in_use_for_a_moment_costs_no_reboot(world: UpgradeWorld, version: str) -> None:
    """On the way there, and on the way back, when a service that has failed may still be about to let go of its GPU."""
    removed, busy = world._rmmod, [2]

    def rmmod(host: t.Any, argv: tuple[str, ...], stdin: t.Any, env: t.Any) -> t.Any:
        if argv[1] == "nvidia" and busy[0] and world.loaded == version:
            busy[0] -= 1
            return (1, "", "rmmod: ERROR: Module nvidia is in use")
        return removed(host, argv, stdin, env)

    world.commands["rmmod *"] = rmmod
    boot = world.files["/proc/sys/kernel/random/boot_id"]
    if version == "580.95.05":
        world.nim_fails_on = version
        with pytest.raises(FleetError) as caught:
            roll(world)
        assert caught.value.facts["outcome"] == "rolled_back"
    else:
        roll(world)
    assert not busy[0] and world.serves() and world.files["/proc/sys/kernel/random/boot_id"] == boot


def test_a_service_that_went_with_the_old_packages_is_not_missed(world: UpgradeWorld) -> None:
    world.commands = {
        "systemctl start nvidia-dcgm.service": (5, "", "Unit nvidia-dcgm.service not found."),
        "systemctl show --no-pager -p LoadState nvidia-dcgm.service": "LoadState=not-found\n",
        **world.commands,
    }
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"


def test_partitions_of_a_gpu_are_seen_before_they_are_lost(world: UpgradeWorld) -> None:
    smi = world.commands["nvidia-smi -q -x"]
    assert callable(smi)
    device = "<mig_devices><mig_device><index>0</index><uuid>MIG-1</uuid></mig_device></mig_devices>"
    world.commands["nvidia-smi -q -x"] = lambda *arguments: re.sub(
        "(?s)<mig_devices>.*?</mig_devices>", device, smi(*arguments)
    )
    with pytest.raises(FleetError, match=r"partitioned \(MIG\)") as caught:
        call(world, "prestaged")
    assert caught.value.reason == "mig_partitions" and world.serves()
    world.unit_state["nvidia-mig-manager.service"] = ["inactive", "enabled"]
    call(world, "prestaged", reboot="always")


def test_modules_beside_the_driver_come_back_with_it(world: UpgradeWorld) -> None:
    """Without nvidia_peermem everything works as before, but not as fast."""
    load = world._modprobe

    def modprobe(host: t.Any, argv: tuple[str, ...], stdin: t.Any, env: t.Any) -> t.Any:
        if argv[1] == "nvidia_fs" and world.loaded == world.nim_fails_on:
            return (1, "", "modprobe: ERROR: could not insert 'nvidia_fs': Exec format error")
        world.files["/sys/module/%s/refcnt" % argv[1]] = b"0\n"
        return load(host, argv, stdin, env)

    world.commands["modprobe *"] = modprobe
    beside = ("nvidia_peermem", "nvidia_fs", "nv_peer_mem")
    for name in beside:
        world.files["/sys/module/%s/refcnt" % name] = b"0\n"
    roll(world)
    assert world.serves() and all(world.exists("/sys/module/" + name) for name in beside)
    assert world.ran("rmmod nvidia_peermem") and world.ran("rmmod nv_peer_mem")
    # One that does not work with the new driver is worth as much as the driver.
    world.nim_fails_on = "595.45.04"
    with pytest.raises(FleetError, match="Loading kernel module nvidia_fs, which was loaded before") as caught:
        roll(world, "595")
    assert caught.value.facts["outcome"] == "rolled_back" and world.serves()
    assert all(world.exists("/sys/module/" + name) for name in beside)


def test_what_was_downloaded_is_installed_although_a_newer_one_has_come(world: UpgradeWorld) -> None:
    """Else it is downloaded while the host is out, and the hosts of one run get different drivers."""
    madison = world.commands["apt-cache madison *"]
    world.without("580.95.05")
    call(world, "prestaged")
    call(world, "drained")
    world.commands["apt-cache madison *"] = madison
    call(world, "ready")
    call(world, "returned")
    assert world.serves() and world.loaded == "580.82.07"
    # It may be gone, too.
    world.packages.clear()
    world.install_driver("555.42.06")
    call(world, "prestaged")
    call(world, "drained")
    world.without("580.95.05")
    call(world, "ready")
    assert world.serves() and world.loaded == "580.82.07"


def test_a_module_that_only_cuda_needs_is_loaded_too(world: UpgradeWorld) -> None:
    """A package has loaded the new driver by itself, and nvidia-smi is content without nvidia_uvm."""
    install = world._apt_get

    def installs(host: t.Any, argv: tuple[str, ...], stdin: t.Any, env: t.Any) -> t.Any:
        said = install(host, argv, stdin, env)
        if world.module == "580.95.05" and not world.loaded:
            world.load(world.module)
            world.remove("/sys/module/nvidia_uvm")
        return said

    world.commands["apt-get *"] = installs
    roll(world)
    assert world.serves() and world.ran("modprobe nvidia_uvm$")


def test_what_nobody_has_foreseen_does_not_leave_the_services_stopped(world: UpgradeWorld) -> None:
    install = world._apt_get

    def no_memory(host: t.Any, argv: tuple[str, ...], stdin: t.Any, env: t.Any) -> t.Any:
        if "nvidia-open-580=580.95.05-0ubuntu1" in argv and "--download-only" not in argv:
            raise OSError(12, "Cannot allocate memory")
        return install(host, argv, stdin, env)

    world.commands["apt-get *"] = no_memory
    with pytest.raises(FleetError, match="Step packages_changed of the upgrade failed with OSError") as caught:
        roll(world)
    assert caught.value.facts["outcome"] == "rolled_back"
    assert world.serves() and world.loaded == "555.42.06"


def test_a_disk_that_is_full_does_not_keep_the_host_from_going_back(world: UpgradeWorld) -> None:
    """Not even the record can be written then; what was unpacked halfway is taken away again."""
    world.broken = "580.95.05-0ubuntu1"
    write = world.write_file

    def full(path: str, content: t.Any, **more: t.Any) -> None:
        if path == RECORD and world.ran("install .*nvidia-open-580=580.95.05-0ubuntu1$"):
            raise FleetError("write_failed", "Writing %s failed: No space left on device." % path)
        write(path, content, **more)

    call(world, "prestaged")
    call(world, "drained")
    world.calls.clear()
    world.write_file = full  # type: ignore[method-assign]  # from one moment on
    with pytest.raises(FleetError) as caught:
        call(world, "ready")
    assert caught.value.reason == "package_failed" and caught.value.facts["outcome"] == "rolled_back"
    assert world.serves() and world.loaded == "555.42.06"


@pytest.mark.parametrize("step", ["workloads_stopped", "loaded"])
def test_a_step_that_cannot_be_written_down_has_the_services_started_again(world: UpgradeWorld, step: str) -> None:
    write = world.write_file

    def full(path: str, content: t.Any, **more: t.Any) -> None:
        if path == RECORD and json.loads(content)["step"] == step:
            raise FleetError("write_failed", "Writing %s failed: No space left on device." % path)
        write(path, content, **more)

    world.write_file = full  # type: ignore[method-assign]  # for one step
    with pytest.raises(FleetError) as caught:
        roll(world)
    assert caught.value.reason == "write_failed"
    assert caught.value.facts["outcome"] == ("restored" if step == "workloads_stopped" else "rolled_back")
    assert world.serves() and world.loaded == "555.42.06"


def test_a_host_that_serves_on_the_new_driver_is_not_taken_back_for_its_record(world: UpgradeWorld) -> None:
    for goal in ("prestaged", "drained", "ready"):
        call(world, goal)
    write = world.write_file

    def full(path: str, content: t.Any, **more: t.Any) -> None:
        if path == RECORD:
            raise FleetError("write_failed", "Writing %s failed: No space left on device." % path)
        write(path, content, **more)

    world.write_file = full  # type: ignore[method-assign]  # from one moment on
    with pytest.raises(FleetError) as caught:
        call(world, "returned")
    assert caught.value.reason == "write_failed" and "outcome" not in caught.value.facts
    assert world.serves() and world.loaded == "580.95.05"


def test_nothing_goes_back_to_what_an_earlier_upgrade_has_left(world: UpgradeWorld) -> None:
    """The role by itself, months later: the record on the host is that of another upgrade."""
    roll(world)
    world.unit_state["nim-qwen.service"][0] = "inactive"

    def full(path: str, _content: t.Any, **_more: t.Any) -> None:
        raise FleetError("write_failed", "Writing %s failed: No space left on device." % path)

    world.write_file = full  # type: ignore[method-assign]  # from one moment on
    with pytest.raises(FleetError) as caught:
        call(world, "drained", "595")
    assert caught.value.reason == "write_failed" and "outcome" not in caught.value.facts
    assert not world.is_active("nim-qwen.service")


def test_a_kernel_that_cannot_unload_says_why_there_is_no_way_back(world: UpgradeWorld) -> None:
    world.can_unload = False
    world.load("555.42.06")
    world.remove("/sys/module/nvidia/refcnt")
    world.nim_fails_on = "580.95.05"
    with pytest.raises(FleetError) as caught:
        roll(world)
    assert caught.value.facts["outcome"] == "stranded"
    assert "takes the new driver out again (the running kernel" in caught.value.message
    assert "driver_upgrade_reboot" not in caught.value.message


def test_a_nim_that_was_not_ready_before_keeps_no_other_out_of_service(world: UpgradeWorld) -> None:
    world.sick = {"qwen"}
    with pytest.raises(FleetError) as caught:
        roll(world)
    assert caught.value.reason == "start_timeout" and caught.value.facts["outcome"] == "rolled_back"
    assert world.serves() and world.loaded == "555.42.06"
    # The load balancer is told of this one alone.
    assert caught.value.facts["record"]["serving"] == ("llama",)


def test_a_nim_that_nobody_runs_is_not_started(world: UpgradeWorld) -> None:
    world.unit_state["nim-qwen.service"][0] = "inactive"
    roll(world)
    assert not world.is_active("nim-qwen.service") and record_of(world).workloads == ("llama",)


def test_the_way_back_goes_where_the_old_driver_came_from(world: UpgradeWorld) -> None:
    world.packages["nvidia-utils-555-server"] = ["555.42.06-0ubuntu0.24.04.1", "ii"]
    said = call(world, "prestaged")[1]["way_back"]
    assert record_of(world).before.source == "distribution" and "nvidia-headless-555-server" in said


def test_a_full_boot_partition_is_seen_before_anything_is_stopped(world: UpgradeWorld) -> None:
    world.files["/boot/initrd.img-%s" % KERNEL] = b"x" * 1000
    free = world.free_bytes
    world.free_bytes = lambda path: 999 if path == "/boot" else free(path)  # type: ignore[method-assign]
    world.files["/proc/self/mountinfo"] = b"1 1 0:1 / / rw\n2 1 0:2 / /boot rw\n"
    with pytest.raises(FleetError, match="/boot") as caught:
        call(world, "prestaged")
    assert caught.value.reason == "disk_full" and world.serves()


def test_an_interrupted_installation_of_others_is_refused_while_the_host_serves(world: UpgradeWorld) -> None:
    """It would be gone on with between the old driver and the new one, and on the way back again."""
    world.packages["linux-image-x"] = ["6.8", "iF"]
    with pytest.raises(FleetError, match="linux-image-x") as caught:
        call(world, "prestaged")
    assert caught.value.reason == "packages_interrupted" and world.serves()


def test_an_interrupted_installation_of_others_takes_nobody_out_of_service(world: UpgradeWorld) -> None:
    roll(world)
    world.packages["linux-image-x"] = ["6.8", "iF"]
    assert not call(world, "prestaged")[1]["due"]
    del world.packages["linux-image-x"]
    world.packages["nvidia-utils-580"][1] = "hF"
    assert call(world, "drained", check_mode=True)[1]["due"]


def test_an_upgrade_can_be_given_up_while_only_services_of_the_driver_are_stopped(world: UpgradeWorld) -> None:
    call(world, "prestaged")
    call(world, "drained")
    world.dirs.add("/run/gpu_fleet")
    world.files["/run/gpu_fleet/driver-clients.json"] = b'{"units": ["nvidia-persistenced.service"]}'
    world.unit_state["nvidia-persistenced.service"][0] = "inactive"
    assert call(world, "restored")[1]["outcome"] == "restored"
    assert world.is_active("nvidia-persistenced.service") and world.serves()


def test_an_upgrade_that_is_given_up_on_the_new_driver_is_validated_first(world: UpgradeWorld) -> None:
    """The run that goes on with it cannot drain the host, which is out already."""
    for goal in ("prestaged", "drained", "ready"):
        call(world, goal)
    found = json.loads(world.files[RECORD])
    world.files[RECORD] = json.dumps(dict(found, step="loaded", validated="")).encode()
    world.gpus_of["580.95.05"] = 0
    with pytest.raises(FleetError, match="shows 0 GPUs"):
        call(world, "restored")
    assert record_of(world).open
    world.gpus_of.clear()
    assert call(world, "restored")[1]["outcome"] == "restored" and record_of(world).validated
    assert world.serves() and world.loaded == "580.95.05"


def test_a_host_under_maintenance_is_not_given_up(world: UpgradeWorld) -> None:
    """After a drain that took too long: whoever works on it now would else get its requests."""
    call(world, "prestaged")
    call(world, "drained")
    world.files[MAINTENANCE_FILE] = b"bad fan, Kim\n"
    with pytest.raises(FleetError) as caught:
        call(world, "restored")
    assert caught.value.reason == "host_held" and "outcome" not in caught.value.facts and record_of(world).open
    world.remove(MAINTENANCE_FILE)
    assert call(world, "restored")[1]["outcome"] == "restored" and world.serves()


@pytest.mark.parametrize("moment", ["drained", "rmmod nvidia"])
def test_maintenance_that_begins_meanwhile_keeps_the_host_out(world: UpgradeWorld, moment: str) -> None:
    """Whoever goes on after the module would else give requests to a host that somebody works on."""
    call(world, "prestaged")
    call(world, "drained")
    if moment == "drained":
        world.files[MAINTENANCE_FILE] = b"bad fan, Kim\n"
    else:
        removed = world._rmmod

        def rmmod(*arguments: t.Any) -> t.Any:
            world.files[MAINTENANCE_FILE] = b"bad fan, Kim\n"
            return removed(*arguments)

        world.commands["rmmod *"] = rmmod
    with pytest.raises(FleetError, match="somebody else has put this host under maintenance") as caught:
        call(world, "ready")
    assert caught.value.reason == "host_held" and "outcome" not in caught.value.facts
    assert world.files[MAINTENANCE_FILE] == b"bad fan, Kim\n" and record_of(world).open
    with pytest.raises(FleetError):
        call(world, "returned")
    assert call(world, "prestaged")[1]["held"]
    world.remove(MAINTENANCE_FILE)
    world.commands["rmmod *"] = world._rmmod
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"


CDI_SPEC = "/var/run/cdi/nvidia.yaml"


def with_cdi(world: UpgradeWorld, *, unit: bool) -> None:
    """A host with a CDI specification, which ``nvidia-ctk`` writes or the unit that runs it."""

    def generate(host: t.Any, *_: t.Any) -> str:
        assert world.loaded == world.module
        host.write_file(CDI_SPEC, "- /usr/lib/libcuda.so.%s\n" % world.loaded, mode=0o644)
        return "LoadState=loaded\n"

    world.files[CDI_SPEC] = b"- /usr/lib/libcuda.so.555.42.06\n"
    more: dict[str, t.Any] = {"nvidia-ctk cdi generate *": generate}
    if unit:
        more = {
            "nvidia-ctk *": (1, "", "not by hand"),
            "systemctl show --no-pager -p LoadState nvidia-cdi-refresh.service": "LoadState=loaded\n",
            "systemctl restart nvidia-cdi-refresh.service": generate,
        }
    world.commands = {**more, **world.commands}


@pytest.mark.parametrize("unit", [False, True])
def test_containers_find_the_libraries_of_the_new_driver(world: UpgradeWorld, unit: bool) -> None:
    """The unit that watches for new modules is stopped while they come, and nothing else renews the specification."""
    with_cdi(world, unit=unit)
    roll(world)
    assert world.files[CDI_SPEC] == b"- /usr/lib/libcuda.so.580.95.05\n"


def test_containers_find_the_libraries_of_the_old_driver_after_a_way_back(world: UpgradeWorld) -> None:
    with_cdi(world, unit=True)
    world.nim_fails_on = "580.95.05"
    with pytest.raises(FleetError):
        roll(world)
    assert world.files[CDI_SPEC] == b"- /usr/lib/libcuda.so.555.42.06\n" and world.serves()


def test_a_specification_that_nobody_has_is_written_where_containers_ask_by_it(world: UpgradeWorld) -> None:
    with_cdi(world, unit=False)
    del world.files[CDI_SPEC]
    world.dirs.add("/var/run/cdi")
    roll(world)
    assert CDI_SPEC not in world.files
    world.packages.clear()
    world.install_driver("555.42.06")
    roll(world, gpu_injection="cdi")
    assert CDI_SPEC in world.files
