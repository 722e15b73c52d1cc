# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json
import re
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade import DriverUpgrade
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade_precheck import installed_size
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_upgrade_record import (
    RECORD,
    STEPS,
    read_record,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import MAINTENANCE_FILE
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption, Outcome
from upgrade_world import GOALS, SERVICES, UpgradeWorld, call, install_fakes, record_of, roll

#: (old driver, branch, driver in the end)
WAYS = [
    ("555.42.06", "580", "580.95.05"),
    ("580.95.05", "595", "595.45.04"),
    ("595.45.04", "580", "580.95.05"),
    ("580.95.05", "535", "535.183.06"),
]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> UpgradeWorld:
    made = UpgradeWorld()
    install_fakes(monkeypatch, made)
    return made


def actions(outcome: Outcome[t.Any]) -> list[str]:
    return [change.action for change in outcome.changes]


# -- the way there --------------------------------------------------------------------------------


@pytest.mark.parametrize("old, branch, new", WAYS)
def test_from_branch_to_branch_without_a_reboot(
    monkeypatch: pytest.MonkeyPatch, old: str, branch: str, new: str
) -> None:
    world = UpgradeWorld(old)
    install_fakes(monkeypatch, world)
    units = {unit: state[0] for unit, state in world.unit_state.items()}
    answer = roll(world, branch)
    assert world.serves() and world.loaded == new
    assert answer["outcome"] == "updated" and answer["due"] is False
    assert {unit: state[0] for unit, state in world.unit_state.items()} == units
    assert world.requests == list(SERVICES)
    assert [entry["step"] for entry in record_of(world).steps] == list(STEPS)
    assert record_of(world).before.version == old


def test_a_second_run_changes_nothing(world: UpgradeWorld) -> None:
    roll(world)
    before, steps = dict(world.files), len(world.calls)
    for goal in GOALS:
        outcome, answer = call(world, goal)
        assert not outcome.changed and not answer["due"], goal
    assert world.files == before
    assert not [line for line in world.ran(r"systemctl (stop|start)|rmmod|modprobe") if line in world.calls[steps:]]


def test_a_host_that_has_the_driver_already_gets_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    world = UpgradeWorld("580.95.05")
    install_fakes(monkeypatch, world)
    roll(world)
    assert read_record(world) is None and world.serves()


def test_check_mode_says_every_step_and_touches_nothing(world: UpgradeWorld) -> None:
    before = dict(world.files)
    outcome, answer = call(world, "returned", check_mode=True)
    assert actions(outcome) == list(STEPS)
    assert max(change.disruption for change in outcome.changes) == Disruption.UNLOAD_DRIVER
    assert answer["due"] and world.files == before and world.serves()
    looked = call(world, "prestaged", check_mode=True)[1]
    assert len(looked["steps"]) == len(STEPS) and looked["serving"] == list(SERVICES)
    assert not world.ran(r"systemctl (stop|start)|rmmod|modprobe|apt-get (?!.*-s)")
    outcome, _answer = call(world, "returned", check_mode=True, reboot="always")
    assert max(change.disruption for change in outcome.changes) == Disruption.REBOOT


def test_nothing_stops_before_the_host_was_drained(world: UpgradeWorld) -> None:
    call(world, "prestaged")
    call(world, "drained")
    assert not world.ran(r"systemctl (stop|start)|rmmod|modprobe|docker stop")
    assert world.ran(r"--download-only .*nvidia-open-580=580")
    assert not world.exists(MAINTENANCE_FILE)


def test_services_stop_before_the_clients_and_start_after_the_validation(world: UpgradeWorld) -> None:
    roll(world)
    lines = world.ran(r"systemctl (stop|start) |rmmod nvidia$|apt-get.* install .*nvidia-open|modprobe nvidia$")
    order = [
        next(number for number, line in enumerate(lines) if text in line)
        for text in (
            "stop nim-llama",
            "stop nvidia-cdi-refresh.path",
            "stop nvidia-persistenced",
            "rmmod nvidia",
            "modprobe nvidia",
            "start nvidia-persistenced",
            "start nim-llama",
        )
    ]
    assert order == sorted(order)


# -- with a reboot --------------------------------------------------------------------------------


def test_a_kernel_that_cannot_unload_is_rebooted_once(world: UpgradeWorld) -> None:
    world.can_unload = False
    world.load("555.42.06")
    world.remove("/sys/module/nvidia/refcnt")
    call(world, "prestaged")
    call(world, "drained")
    outcome, answer = call(world, "ready")
    assert answer["reboot_required"] and "without module unloading" in answer["reboot_reason"]
    assert {change.action for change in outcome.blocked} == {"loaded", "validated", "workloads_started", "ready"}
    # Until the reboot every further call says the same and does nothing.
    outcome, answer = call(world, "ready")
    assert answer["reboot_required"] and not outcome.changed
    world.reboot()
    # Nothing has started behind our back: the marker has survived.
    assert not world.is_active("nim-llama.service")
    assert not call(world, "ready")[1]["reboot_required"]
    call(world, "returned")
    assert world.serves() and world.loaded == "580.95.05"
    # A service that was not enabled, but ran, runs again.
    assert world.is_active("nvidia-dcgm.service")
    assert not world.exists("/var/lib/gpu_fleet/driver-reboot.json")


@pytest.mark.parametrize("loads_itself", [False, True])
def test_always_reboots_although_a_reload_would_do(world: UpgradeWorld, loads_itself: bool) -> None:
    world.loads_itself = loads_itself
    boot = world.files["/proc/sys/kernel/random/boot_id"]
    roll(world, reboot="always")
    assert not world.exists("/var/lib/gpu_fleet/driver-reboot.json")
    assert world.serves() and world.files["/proc/sys/kernel/random/boot_id"] != boot


def test_never_reboot_leaves_the_host_on_the_old_driver(world: UpgradeWorld) -> None:
    world.refuses["nvidia"] = "Module nvidia is in use"
    with pytest.raises(FleetError, match="set driver_upgrade_reboot to auto") as caught:
        roll(world, reboot="never")
    assert caught.value.reason == "reboot_needed" and caught.value.facts["outcome"] == "restored"
    assert world.serves() and world.loaded == "555.42.06"


def test_a_driver_that_does_not_load_after_its_one_reboot_is_rolled_back(world: UpgradeWorld) -> None:
    world.load_error = "Invalid argument"
    call(world, "prestaged")
    call(world, "drained")
    assert call(world, "ready")[1]["reboot_required"]
    world.reboot()
    # The boot has not loaded it either.
    world.remove("/sys/module")
    world.remove("/proc/driver/nvidia")
    loads = world._modprobe

    def only_the_old_one(host: t.Any, argv: tuple[str, ...], stdin: t.Any, env: t.Any) -> t.Any:
        world.load_error = "" if world.module == "555.42.06" else "Invalid argument"
        return loads(host, argv, stdin, env)

    world.commands["modprobe *"] = only_the_old_one
    with pytest.raises(FleetError, match="already rebooted once") as caught:
        call(world, "ready")
    assert caught.value.facts["outcome"] == "rolled_back"
    assert world.serves() and world.loaded == "555.42.06"
    # Nor is it by a run of next night, as long as nobody has found out why.
    for goal in ("prestaged", "drained"):
        call(world, goal, run="next night")
    with pytest.raises(FleetError, match=r"rebooted once for driver \S+ in an earlier run") as caught:
        call(world, "ready", run="next night")
    assert caught.value.facts["outcome"] == "rolled_back" and world.serves()
    # When it loads, nobody minds.
    world.commands["modprobe *"], world.load_error = loads, ""
    roll(world, run="the night after")
    assert world.serves() and world.loaded == "580.95.05" and record_of(world).rebooted == ""


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_process_of_somebody_else_is_found_before_anything_begins(world: UpgradeWorld) -> None:
    world.hold_gpu(812, "train.service")
    with pytest.raises(FleetError, match=r"pid 812 \(python3\) of unit train.service") as caught:
        call(world, "prestaged")
    assert caught.value.reason == "gpu_in_use" and "outcome" not in caught.value.facts
    with pytest.raises(FleetError):
        call(world, "prestaged", check_mode=True)
    assert world.serves()


def test_an_idle_container_with_gpus_counts_as_somebody_else(world: UpgradeWorld) -> None:
    world.docker.strangers["notebook"] = {
        "HostConfig": {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]},
        "Config": {"Env": []},
    }
    with pytest.raises(FleetError, match="container notebook"):
        call(world, "prestaged")
    world.docker.strangers["notebook"] = {"HostConfig": {"Runtime": "nvidia"}, "Config": {"Env": ["A=b"]}}
    call(world, "prestaged")


def test_a_process_that_comes_after_the_drain_costs_nothing_but_the_drain(world: UpgradeWorld) -> None:
    call(world, "prestaged")
    call(world, "drained")
    world.hold_gpu(812, "train.service")
    with pytest.raises(FleetError) as caught:
        call(world, "ready")
    assert caught.value.reason == "gpu_in_use" and caught.value.facts["outcome"] == "restored"
    assert world.serves() and world.loaded == "555.42.06"
    times = record_of(world).failure
    assert times["step"] == "workloads_stopped" and times["began"] <= times["at"] <= times["until"]
    world.release_gpu(812)
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"


def test_a_module_that_does_not_go_has_the_services_started_again(world: UpgradeWorld) -> None:
    world.refuses["nvidia_uvm"] = "Module nvidia_uvm is in use"
    with pytest.raises(FleetError) as caught:
        roll(world, reboot="never")
    assert caught.value.facts["outcome"] == "restored" and caught.value.facts["step"] == "unloaded"
    assert "Driver 555.42.06 was left in place and the services run on it again." in caught.value.message
    assert world.serves() and world.loaded == "555.42.06"
    assert all(world.unit_state[unit][0] == "active" for unit in ("nvidia-persistenced.service", "nvidia-dcgm.service"))


def test_packages_that_cannot_be_installed_are_rolled_back(world: UpgradeWorld) -> None:
    world.broken = "580.95.05-0ubuntu1"
    with pytest.raises(FleetError) as caught:
        roll(world)
    assert caught.value.reason == "package_failed" and caught.value.facts["outcome"] == "rolled_back"
    assert "The old driver 555.42.06 was put back and the services run on it again." in caught.value.message
    assert world.serves() and world.loaded == "555.42.06"
    assert all(world.unit_state[unit][0] == "active" for unit in ("nvidia-persistenced.service", "nvidia-dcgm.service"))


def test_a_module_that_cannot_be_built_is_rolled_back(world: UpgradeWorld) -> None:
    world.build_fails = "580.95.05"
    with pytest.raises(FleetError) as caught:
        roll(world)
    assert "follow_pfn" in caught.value.message and caught.value.facts["outcome"] == "rolled_back"
    assert world.serves() and world.loaded == "555.42.06"


def test_a_nim_that_does_not_get_ready_on_the_new_driver_goes_back_to_the_old_one(world: UpgradeWorld) -> None:
    world.nim_fails_on = "580.95.05"
    with pytest.raises(FleetError) as caught:
        roll(world)
    assert caught.value.reason == "start_timeout" and caught.value.facts["outcome"] == "rolled_back"
    assert world.serves() and world.loaded == "555.42.06"
    assert world.requests == list(SERVICES)


def test_a_gpu_that_the_new_driver_does_not_show_is_a_reason_to_go_back(world: UpgradeWorld) -> None:
    world.gpus_of["580.95.05"] = 0
    with pytest.raises(FleetError, match="shows 0 GPUs where the old one showed 1") as caught:
        roll(world)
    assert caught.value.reason == "gpu_missing" and caught.value.facts["outcome"] == "rolled_back"
    assert world.serves() and world.loaded == "555.42.06"


def test_a_gpu_that_is_not_fit_on_the_new_driver_is_a_reason_to_go_back(world: UpgradeWorld) -> None:
    smi = world.commands["nvidia-smi -q -x"]
    assert callable(smi)

    def sick(*arguments: t.Any) -> t.Any:
        found = smi(*arguments)
        if isinstance(found, str) and world.loaded == "580.95.05":
            found = re.sub("<gpu_recovery_action>.*?<", "<gpu_recovery_action>Node Reboot<", found)
        return found

    world.commands["nvidia-smi -q -x"] = sick
    with pytest.raises(FleetError, match="reboot the host") as caught:
        roll(world)
    assert caught.value.facts["step"] == "validated" and caught.value.facts["outcome"] == "rolled_back"
    assert world.serves() and world.loaded == "555.42.06"
    roll(world, gpu_health="warn")
    assert world.serves() and world.loaded == "580.95.05"


def test_without_the_old_packages_the_host_stays_out_with_its_record(world: UpgradeWorld) -> None:
    world.nim_fails_on = "580.95.05"
    world.without("| 555")
    with pytest.raises(FleetError) as caught:
        roll(world)
    assert "the host stays out of service" in caught.value.message
    assert caught.value.facts["outcome"] == "stranded"
    found = record_of(world)
    assert found.open and found.failure["reason"] == "start_timeout" and found.workloads == SERVICES
    assert not world.is_active("nim-llama.service") and world.exists(MAINTENANCE_FILE)
    # When the cause is gone, a further run finishes it.
    world.nim_fails_on = ""
    assert call(world, "prestaged")[1]["open"]
    roll(world)
    assert world.serves() and world.loaded == "580.95.05" and record_of(world).outcome == "updated"


def test_the_packages_for_the_way_back_are_there_before_anything_begins(world: UpgradeWorld) -> None:
    answer = call(world, "prestaged")[1]
    assert world.ran(r"--download-only .*nvidia-open-555=555") and answer["way_back"] == ""
    # The repository is away, as it is when a network is.
    world.broken = "580.95.05-0ubuntu1"
    with pytest.raises(FleetError) as caught:
        roll(world)
    assert caught.value.facts["outcome"] == "rolled_back"


def test_it_is_said_beforehand_that_there_is_no_way_back(world: UpgradeWorld) -> None:
    world.without("| 555")
    answer = call(world, "prestaged")[1]
    said = answer["way_back"]
    assert "The driver that is there now could not be put back" in said and "nvidia-open-555" in said
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"


def test_a_driver_that_this_collection_does_not_install_can_be_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    world = UpgradeWorld("470.256.02")
    install_fakes(monkeypatch, world)
    assert "older than this collection installs" in call(world, "prestaged")[1]["way_back"]
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"


def test_a_download_that_fails_leaves_the_host_serving(world: UpgradeWorld) -> None:
    world.commands = {
        "apt-get * --download-only *": (100, "", "E: Failed to fetch http://x/nvidia.deb  Hash Sum mismatch\n"),
        **world.commands,
    }
    with pytest.raises(FleetError, match="Hash Sum mismatch") as caught:
        call(world, "prestaged")
    assert "outcome" not in caught.value.facts and not record_of(world).open
    assert world.serves() and world.loaded == "555.42.06"


def test_downloads_are_chosen_as_if_there_were_no_driver(world: UpgradeWorld) -> None:
    """Else apt finds that the parts of two branches conflict, and downloads nothing."""
    world.files["/var/lib/dpkg/status"] = (
        b"Package: dkms\nStatus: install ok installed\nVersion: 3\n\n"
        b"Package: nvidia-driver-555-open\nStatus: hold ok installed\nDescription: x\n Package: of lies\n\n"
        b"Package: nvidia-container-toolkit\nStatus: install ok installed\nVersion: 1.18\n"
    )
    seen: list[str] = []

    def download(host: t.Any, argv: tuple[str, ...], _stdin: t.Any, _env: t.Any) -> str:
        (status,) = [word.partition("=")[2] for word in argv if word.startswith("Dir::State::status=")]
        (preferences,) = [word.partition("=")[2] for word in argv if word.startswith("Dir::Etc::preferences=")]
        seen.extend([host.read_text(status), host.read_text(preferences)])
        return ""

    world.commands = {"apt-get * --download-only */run/gpu_fleet/prestage*": download, **world.commands}
    call(world, "prestaged")
    assert re.findall(r"(?m)^Package: (.*)", seen[0]) == ["dkms", "nvidia-container-toolkit"]
    assert "Pin: version 580.95.05-*" in seen[1]
    assert not [path for path in world.files if path.startswith("/run/gpu_fleet/prestage")]


def test_a_full_disk_is_seen_before_anything_is_stopped(world: UpgradeWorld) -> None:
    world.free = 10**8
    with pytest.raises(FleetError) as caught:
        call(world, "prestaged")
    assert caught.value.reason == "disk_full" and world.serves()


def test_an_image_that_the_new_driver_is_too_old_for_is_refused(world: UpgradeWorld) -> None:
    world.docker.environment = ["NVIDIA_REQUIRE_CUDA=cuda>=12.9"]
    with pytest.raises(FleetError, match=r"nvcr\.io/nim/meta/llama:1\.8\.4 requires cuda>=12\.9") as caught:
        call(world, "prestaged", "535")
    assert caught.value.reason == "requirement"
    assert caught.value.facts["serving"] == caught.value.facts["models"] == list(SERVICES)
    call(world, "prestaged", "580")


def test_a_version_that_nobody_offers_is_refused(world: UpgradeWorld) -> None:
    with pytest.raises(FleetError) as caught:
        call(world, "prestaged", "570")
    assert caught.value.reason == "version_not_available" and world.serves()


def test_secure_boot_without_a_key_is_refused(world: UpgradeWorld) -> None:
    world.files["/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"] = b"\x06\0\0\0\x01"
    with pytest.raises(FleetError) as caught:
        call(world, "prestaged")
    assert caught.value.reason == "secure_boot_key_not_enrolled" and world.serves()


def test_an_upgrade_can_be_given_up_while_the_old_driver_is_in_place(world: UpgradeWorld) -> None:
    assert not call(world, "restored")[0].changed
    call(world, "prestaged")
    call(world, "drained")
    # The load balancer has refused the drain.
    answer = call(world, "restored")[1]
    assert answer["outcome"] == "restored" and not answer["open"] and world.serves()
    assert not world.ran(r"systemctl (stop|start)|rmmod|modprobe")
    assert not call(world, "restored")[0].changed
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"


def test_a_look_that_fails_leaves_an_open_upgrade_as_it_is(world: UpgradeWorld) -> None:
    """Who only looks cannot give the host its requests back: a closed record would leave it drained for good."""
    for goal in ("prestaged", "drained"):
        call(world, goal)
    good = world.commands
    world.commands = {
        "apt-get * --download-only *": (100, "", "E: Failed to fetch http://x/nvidia.deb  Hash Sum mismatch\n"),
        **good,
    }
    with pytest.raises(FleetError, match="Hash Sum mismatch") as caught:
        call(world, "prestaged", "595")
    assert "outcome" not in caught.value.facts
    assert record_of(world).open and record_of(world).reached("drained") and world.serves()
    world.commands = good
    roll(world)
    assert world.serves() and world.loaded == "580.95.05"


def test_an_upgrade_cannot_be_given_up_between_two_drivers(world: UpgradeWorld) -> None:
    call(world, "prestaged")
    call(world, "drained")
    call(world, "ready", reboot="always")
    with pytest.raises(FleetError) as caught:
        call(world, "restored")
    assert caught.value.reason == "not_restorable" and record_of(world).open
    world.reboot()
    call(world, "ready")
    assert world.serves()


def test_maintenance_of_somebody_else_is_left_alone(world: UpgradeWorld) -> None:
    world.files[MAINTENANCE_FILE] = b"bad fan, Kim\n"
    for goal in GOALS:
        outcome, answer = call(world, goal)
        assert not outcome.changed and answer["maintenance"] == "foreign"
    assert world.files[MAINTENANCE_FILE] == b"bad fan, Kim\n" and world.loaded == "555.42.06"
    assert not world.ran(r"systemctl (stop|start)|rmmod|modprobe")


# -- to the other flavour of the same version ----------------------------------------------------


@pytest.fixture
def of_580(monkeypatch: pytest.MonkeyPatch) -> UpgradeWorld:
    world = UpgradeWorld("580.95.05")
    install_fakes(monkeypatch, world)
    return world


@pytest.mark.parametrize("can_unload", [True, False])
def test_the_other_flavour_is_another_driver(of_580: UpgradeWorld, can_unload: bool) -> None:
    world = of_580
    boot = world.files["/proc/sys/kernel/random/boot_id"]
    if not can_unload:
        world.can_unload = False
        world.remove("/sys/module/nvidia/refcnt")
    assert roll(world, flavour="proprietary")["outcome"] == "updated"
    assert world.serves() and (world.loaded, world.loaded_flavour) == ("580.95.05", "proprietary")
    assert (world.files["/proc/sys/kernel/random/boot_id"] == boot) is can_unload
    assert not call(world, "prestaged", flavour="proprietary")[0].changed


@pytest.mark.parametrize("can_unload", [True, False])
def test_a_flavour_that_was_installed_and_never_loaded_is_due(of_580: UpgradeWorld, can_unload: bool) -> None:
    world = of_580
    world.install_driver("580.95.05", flavour="", loaded=False)
    del (
        world.packages["nvidia-open-580"],
        world.packages["nvidia-driver-580-open"],
        world.packages["nvidia-dkms-580-open"],
    )
    if not can_unload:
        world.can_unload = False
        world.remove("/sys/module/nvidia/refcnt")
    answer = call(world, "prestaged", flavour="proprietary", check_mode=True)[1]
    assert answer["due"]
    assert answer["message"] == "Driver 580.95.05 (open) is loaded and 580.95.05 (proprietary) is installed."
    roll(world, flavour="proprietary")
    assert world.serves() and world.loaded_flavour == "proprietary"
    assert not call(world, "prestaged", flavour="proprietary")[1]["due"]


def test_a_flavour_that_the_gpus_do_not_take_is_rolled_back(of_580: UpgradeWorld) -> None:
    world = of_580

    def modprobe(*arguments: t.Any) -> t.Any:
        if world.flavour == "proprietary":
            world.kernel_log = "NVRM: requires use of the NVIDIA open kernel modules\n"
            return (1, "", "modprobe: ERROR: could not insert 'nvidia': No such device\n")
        return world._modprobe(*arguments)

    world.commands = {"modprobe nvidia": modprobe, **world.commands}
    with pytest.raises(FleetError, match="flavour to open") as caught:
        roll(world, flavour="proprietary")
    assert "The old driver 580.95.05 was put back" in caught.value.message
    assert record_of(world).outcome == "rolled_back" and record_of(world).before.flavour == "open"
    assert world.serves() and world.loaded_flavour == "open" and "nvidia-open-580" in world.packages


def test_an_upgrade_cannot_be_given_up_between_two_flavours(of_580: UpgradeWorld) -> None:
    world = of_580
    world.can_unload = False
    world.remove("/sys/module/nvidia/refcnt")
    for goal in ("prestaged", "drained", "ready"):
        answer = call(world, goal, flavour="proprietary")[1]
    assert answer["reboot_required"]
    with pytest.raises(FleetError, match=r"580\.95\.05 \(open\) is loaded, 580\.95\.05 \(proprietary\) is installed"):
        call(world, "restored", flavour="proprietary")
    world.reboot()
    call(world, "ready", flavour="proprietary")
    assert world.serves() and world.loaded_flavour == "proprietary"


def test_two_flavours_that_were_there_before_keep_no_host_out(of_580: UpgradeWorld) -> None:
    """Nothing was touched, and user space works with both."""
    world = of_580
    world.install_driver("580.95.05", flavour="", loaded=False)
    del (
        world.packages["nvidia-open-580"],
        world.packages["nvidia-driver-580-open"],
        world.packages["nvidia-dkms-580-open"],
    )
    call(world, "prestaged", flavour="proprietary")
    call(world, "drained", flavour="proprietary")
    world.hold_gpu(812, "train.service")
    with pytest.raises(FleetError, match=r"train\.service") as caught:
        call(world, "ready", flavour="proprietary")
    assert "Driver 580.95.05 was left in place" in caught.value.message
    assert world.serves() and world.loaded_flavour == "open" and not world.ran("apt-get .*install .*nvidia-open")
    world.release_gpu(812)
    call(world, "prestaged", flavour="proprietary")
    call(world, "drained", flavour="proprietary")
    assert call(world, "restored", flavour="proprietary")[1]["outcome"] == "restored"
    assert world.serves() and world.loaded_flavour == "open"


# -- odds and ends --------------------------------------------------------------------------------


def test_the_record_has_no_secrets_and_the_times_of_every_step(world: UpgradeWorld) -> None:
    roll(world)
    found = json.loads(world.files[RECORD])
    assert found["version"] == 1 and found["outcome"] == "updated"
    assert all(set(entry) == {"step", "at", "seconds"} for entry in found["steps"])
    assert world.modes[RECORD][0] == 0o644


@pytest.mark.parametrize(
    "text, size",
    [
        ("After this operation, 1,024 MB of additional disk space will be used.", 1_024_000_000),
        ("After this operation, 512 B of additional disk space will be used.", 512),
        ("After this operation, 100 MB disk space will be freed.", 0),
        ("", 0),
    ],
)
def test_what_apt_says_of_the_space(text: str, size: int) -> None:
    assert installed_size(text) == size


@pytest.mark.parametrize("more", [{"goal": "done"}, {"reboot": "maybe"}])
def test_bad_options(more: dict[str, str]) -> None:
    with pytest.raises(FleetError) as caught:
        DriverUpgrade(driver={"branch": "580"}, **more)
    assert caught.value.reason == "invalid_option"


def test_a_host_without_a_gpu_is_left_alone() -> None:
    world = UpgradeWorld()
    world.remove("/sys/bus/pci/devices")
    outcome, answer = call(world, "prestaged")
    assert not outcome.changed and not answer["gpu"] and not answer["due"]
