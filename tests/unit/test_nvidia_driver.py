# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The driver resource: every plan, every refusal, interrupted runs."""

from __future__ import annotations

import re

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _packages
from ansible_collections.gpu_fleet.nim.plugins.module_utils._apt_sources import debian_source
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nouveau import (
    BLACKLIST,
    BLACKLIST_CONTENT,
    remove_blacklist,
    write_blacklist,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver import NvidiaDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_state import (
    LOCKED,
    NON_FREE,
    PREFERENCES,
    UNATTENDED,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import OsRelease
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption, Outcome, converge
from ansible_collections.gpu_fleet.nim.plugins.module_utils._secure_boot import secure_boot_enabled
from driver_world import KERNEL, URL, DriverWorld
from fake_host import FakeHost

SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
BOOKWORM = OsRelease("debian", "12", 12, "bookworm", (), "Debian 12")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> DriverWorld:
    monkeypatch.setattr(_packages, "download", lambda _url: b"\x99\x01key")
    return DriverWorld()


def run(world: DriverWorld, *, check: bool = False, **options: object) -> Outcome:  # type: ignore[type-arg]
    return converge(world, NvidiaDriver(**options), check_mode=check)  # type: ignore[arg-type]


def actions(outcome: Outcome) -> list[str]:  # type: ignore[type-arg]
    return [change.action for change in outcome.changes]


# -- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"branch": "581"}, "nvidia_driver_branch = '581'"),
        ({"branch": "580", "version": "570.124.06"}, "not in branch 580"),
        ({"branch": "620", "flavour": "proprietary"}, "no proprietary kernel modules"),
        ({"repository_url": "mirror.example.org/cuda"}, "nvidia_driver_repository_url"),
        ({"repository_url": "file:///srv"}, "nvidia_driver_repository_url"),
        ({"source": "runfile"}, "nvidia_driver_source"),
        ({"flavour": "closed"}, "nvidia_driver_flavour"),
        ({"fabric_manager": "yes"}, "nvidia_driver_fabric_manager"),
        ({"imex": "yes"}, "nvidia_driver_imex"),
        ({"secure_boot": "off"}, "nvidia_driver_secure_boot"),
    ],
)
def test_options_that_are_wrong_on_every_host(options: dict[str, str], words: str) -> None:
    with pytest.raises(FleetError) as caught:
        NvidiaDriver(**options)  # type: ignore[arg-type]
    assert caught.value.reason == "invalid_option"
    assert words in caught.value.message


# -- no GPU


def test_a_host_without_a_gpu_is_left_alone() -> None:
    world = DriverWorld(gpus=0)
    outcome = run(world)
    assert not outcome.changed
    assert world.calls == []
    answer = NvidiaDriver().result(outcome.state)
    assert answer["message"] == "This host has no NVIDIA GPU on its PCI bus; it was left alone."
    assert answer["gpus"] == []


def test_a_host_without_a_gpu_may_run_anything() -> None:
    world = DriverWorld(gpus=0)
    world.files["/etc/os-release"] = b"ID=arch\n"
    assert not run(world).changed


# -- fresh host: check, run, check, run


def test_fresh_host(world: DriverWorld) -> None:
    planned = run(world, check=True)
    expected = ["headers", "repository", "file", "blacklist", "packages", "hold", "file"]
    assert actions(planned) == expected
    assert world.packages == {}
    assert PREFERENCES not in world.files
    assert max(change.disruption for change in planned.changes) == Disruption.NONE

    done = run(world)
    assert actions(done) == expected
    assert [change.as_dict() for change in done.changes] == [change.as_dict() for change in planned.changes]
    assert world.packages["nvidia-open-580"] == ["580.95.05-0ubuntu1", "hi"]
    assert world.packages["libnvidia-compute-580"][1] == "hi"
    assert world.packages["linux-headers-" + KERNEL][1] == "ii"
    assert b"URIs: %s\n" % URL.encode() in world.files["/etc/apt/sources.list.d/nvidia-cuda.sources"]
    assert b"Package-Blacklist" in world.files[UNATTENDED]
    assert b"blacklist nouveau" in world.files[BLACKLIST]
    assert world.ran("update-initramfs -u -k all")
    answer = NvidiaDriver().result(done.state)
    assert answer["flavour"] == "open"
    assert answer["cuda_version"] == "13.0"
    assert answer["on_disk"] == answer["user_space"] == "580.95.05"
    assert answer["reload_required"]

    assert not run(world, check=True).changed
    before = dict(world.packages)
    assert not run(world).changed
    assert world.packages == before


def test_downloads_come_before_the_installation(world: DriverWorld) -> None:
    run(world)
    transactions = world.ran(r"apt-get .*install.*nvidia-open-580=")
    assert "--download-only" in transactions[0]
    assert "--download-only" not in transactions[1]


def test_branch_590_and_later_pin_first(world: DriverWorld) -> None:
    outcome = run(world, branch="595")
    assert PREFERENCES not in world.files
    assert world.packages["nvidia-driver-pinning-595"][1] == "hi"
    installs = [line for line in world.ran("apt-get .*install ") if "--download-only" not in line]
    assert "nvidia-driver-pinning-595=595-1" in installs[-2]
    assert "nvidia-open=595.45.04-1ubuntu1" in installs[-1]
    assert not run(world, branch="595").changed
    assert "file" in actions(outcome)


# -- the loaded driver


def test_a_branch_change_unloads_first_and_stops_only_the_drivers_own_services(world: DriverWorld) -> None:
    world.install_driver("535.183.06", flavour="")
    world.unit_state = {
        "nvidia-persistenced.service": ["active", "enabled"],
        "nvidia-cdi-refresh.path": ["active", "enabled"],
    }
    world.hold_gpu(91, "nvidia-persistenced.service", "nvidia-persistenced")

    def stop_persistenced(*arguments: object) -> object:
        world.release_gpu(91)
        del world.commands["systemctl stop nvidia-persistenced.service"]
        return world._systemctl(*arguments)  # type: ignore[arg-type]

    world.commands = {"systemctl stop nvidia-persistenced.service": stop_persistenced, **world.commands}
    outcome = run(world)
    packages = next(change for change in outcome.changes if change.action == "packages")
    assert packages.disruption == Disruption.UNLOAD_DRIVER
    assert packages.before == "535.183.06"
    assert packages.why == "another branch is installed"
    lines = world.ran(r"systemctl stop|rmmod|apt-get .*(purge|install) .*nvidia|apt-get -q -y -o .* purge")
    order = [
        re_first(lines, words)
        for words in (
            "--download-only",
            "stop nvidia-cdi-refresh.path",
            "stop nvidia-persistenced",
            "rmmod nvidia_modeset",
            "rmmod nvidia_uvm",
            "rmmod nvidia$",
            "Timeout=600 purge",
            "nvidia-open-580=580.95.05-0ubuntu1$",
        )
    ]
    assert order == sorted(order)
    assert not [name for name in world.packages if "535" in name]
    assert outcome.state.loaded_version == ""


def re_first(lines: list[str], pattern: str) -> int:
    import re

    found = [
        index
        for index, line in enumerate(lines)
        if re.search(pattern, line) and ("--download-only" in line) == (pattern == "--download-only")
    ]
    assert found, (pattern, lines)
    return found[-1] if pattern.endswith("ubuntu1$") else found[0]


def test_a_gpu_in_use_blocks_everything(world: DriverWorld) -> None:
    world.install_driver("535.183.06", flavour="")
    container = "ab" * 32
    world.hold_gpu(812, "docker-%s.scope" % container)
    world.files["/var/lib/docker/containers/%s/config.v2.json" % container] = b'{"Name": "/nim-llama"}'
    world.hold_gpu(900, "trainer.service", "/opt/train --token=secret")
    before = (dict(world.packages), dict(world.files))
    outcome = run(world)
    assert not outcome.changed
    assert outcome.blocked
    assert (dict(world.packages), dict(world.files)) == before
    with pytest.raises(FleetError) as caught:
        NvidiaDriver().result(outcome.state)
    assert caught.value.reason == "gpu_in_use"
    assert "pid 812 (python3) in container nim-llama" in caught.value.message
    assert "pid 900 (/opt/train) of unit trainer.service" in caught.value.message
    assert "secret" not in caught.value.message
    assert caught.value.facts["holders"][0]["container"] == "nim-llama"
    world.release_gpu(812)
    world.release_gpu(900)
    assert run(world).changed


@pytest.mark.parametrize("check", [True, False])
def test_a_missing_part_of_the_loaded_version_is_put_back_under_running_containers(
    world: DriverWorld, check: bool
) -> None:
    world.configured()
    world.install_driver("580.95.05")
    world.hold_gpu(4242, "docker.service")
    for name in ("nvidia-open-580", "nvidia-driver-580-open", "libnvidia-compute-580"):
        del world.packages[name]
    resource = NvidiaDriver(branch="580", version="580.95.05")
    outcome = converge(world, resource, check_mode=check)
    (packages,) = [change for change in outcome.changes if change.action == "packages"]
    assert packages.disruption is Disruption.NONE
    assert "nvidia-open-580 is missing" in packages.why
    assert outcome.blocked == []
    assert ("not installed yet" in resource.result(outcome.state)["message"]) is check
    assert world.ran("rmmod|systemctl stop") == []


@pytest.mark.parametrize(("loaded", "command"), [(True, "enable --now"), (False, "enable")])
def test_a_disabled_service_is_started_too_where_the_driver_is_loaded(
    world: DriverWorld, loaded: bool, command: str
) -> None:
    world.configured()
    world.install_driver("580.95.05", loaded=loaded)
    world.unit_state["nvidia-persistenced.service"] = ["inactive", "disabled"]
    assert actions(run(world)) == ["enable"]
    assert world.ran("systemctl enable") == ["systemctl %s nvidia-persistenced.service" % command]


def test_a_masked_service_of_the_driver(world: DriverWorld) -> None:
    world.configured()
    world.install_driver("580.95.05")
    shown = "systemctl show --no-pager -p UnitFileState nvidia-persistenced.service"
    world.commands = {shown: "UnitFileState=masked\n", **world.commands}
    with pytest.raises(FleetError) as caught:
        converge(world, NvidiaDriver(branch="580"), check_mode=False)
    assert caught.value.reason == "unit_masked"
    assert "systemctl unmask nvidia-persistenced.service" in caught.value.message
    assert not converge(world, NvidiaDriver(branch="580", persistenced=False), check_mode=True).blocked


def test_somebody_who_comes_between_look_and_change(world: DriverWorld) -> None:
    world.install_driver("535.183.06", flavour="")

    def download(*_arguments: object) -> str:
        world.hold_gpu(77, "late.service")
        return ""

    world.commands = {"apt-get * --download-only *": download, **world.commands}
    with pytest.raises(FleetError, match="pid 77"):
        run(world)
    assert world.packages["libnvidia-compute-535"][1] == "hi"
    assert world.ran("rmmod") == []


def test_in_use_does_not_matter_when_the_packages_stay(world: DriverWorld) -> None:
    world.install_driver("580.95.05")
    world.configured()
    world.hold_gpu(812, "nim-llama.service")
    outcome = run(world)
    assert not outcome.changed
    assert NvidiaDriver().result(outcome.state)["message"] == "Driver 580.95.05: loaded = on disk = user space."


def test_a_kernel_that_cannot_unload_gets_the_packages_and_keeps_its_services(world: DriverWorld) -> None:
    world.can_unload = False
    world.install_driver("535.183.06", flavour="")
    world.unit_state = {"nvidia-persistenced.service": ["active", "enabled"]}
    outcome = run(world)
    assert world.packages["nvidia-open-580"][0] == "580.95.05-0ubuntu1"
    assert world.unit_state["nvidia-persistenced.service"][0] == "active"
    answer = NvidiaDriver().result(outcome.state)
    assert answer["reload_required"]
    assert answer["message"] == "Driver 580.95.05 is installed; 535.183.06 is still loaded."


def test_without_unload_the_module_stays(world: DriverWorld) -> None:
    world.install_driver("535.183.06", flavour="")
    run(world, unload=False)
    assert world.ran("rmmod") == []


def test_no_service_of_the_driver_stops_for_a_module_that_cannot_go(world: DriverWorld) -> None:
    world.can_unload = False
    world.install_driver("535.183.06", flavour="")
    world.unit_state["nvidia-persistenced.service"] = ["active", "enabled"]
    planned = run(world, check=True)
    assert max(change.disruption for change in planned.changes) == Disruption.NONE
    assert "packages" in actions(run(world))
    assert world.ran("systemctl stop|rmmod") == []


# -- versions


def test_a_newer_version_of_the_branch_is_not_taken_by_itself(world: DriverWorld) -> None:
    world.install_driver("580.65.06")
    world.configured()
    assert not run(world).changed


def test_an_exact_version_upgrades_and_downgrades(world: DriverWorld) -> None:
    world.install_driver("580.95.05")
    world.configured()
    outcome = run(world, version="580.65.06")
    assert "packages" in actions(outcome)
    assert world.packages["nvidia-open-580"] == ["580.65.06-0ubuntu1", "hi"]
    assert world.ran("purge") == []
    assert b"Pin: version 580.65.06-*" in world.files[PREFERENCES]
    assert not run(world, version="580.65.06").changed
    assert "packages" not in actions(run(world))


def test_flavour_change(world: DriverWorld) -> None:
    world.install_driver("580.95.05")
    outcome = run(world, flavour="proprietary")
    assert "packages" in actions(outcome)
    assert "nvidia-open-580" not in world.packages
    assert world.packages["cuda-drivers-580"][0] == "580.95.05-0ubuntu1"


@pytest.mark.parametrize("options", [{"unload": False}, {"unload": True}])
def test_the_old_flavour_that_stays_in_memory_is_told(world: DriverWorld, options: dict[str, bool]) -> None:
    world.install_driver("580.95.05")
    world.refuses["nvidia"] = "Module nvidia is in use"
    outcome = run(world, flavour="proprietary", **options)
    driver = NvidiaDriver(flavour="proprietary", **options)
    answer = driver.result(outcome.state)
    assert answer["reload_required"]
    assert answer["message"] == "Driver 580.95.05 (proprietary) is installed; 580.95.05 (open) is still loaded."
    world.load("580.95.05", "proprietary")
    answer = driver.result(driver.observe(world))
    assert not answer["reload_required"]
    assert answer["message"] == "Driver 580.95.05: loaded = on disk = user space."


def test_packages_of_the_other_flavour_are_not_put_back_beside_the_loaded_one(world: DriverWorld) -> None:
    world.configured()
    world.load("580.95.05", "proprietary")
    options = {"version": "580.95.05", "flavour": "open"}
    packages = next(change for change in run(world, check=True, **options).changes if change.action == "packages")
    assert packages.disruption == Disruption.UNLOAD_DRIVER
    world.load("580.95.05", "open")
    packages = next(change for change in run(world, check=True, **options).changes if change.action == "packages")
    assert packages.disruption == Disruption.NONE


def test_an_old_gpu_gets_the_proprietary_modules_and_no_newer_branch() -> None:
    world = DriverWorld(device="0x1db4")
    planned = NvidiaDriver().package_plan(NvidiaDriver().observe(world))
    assert planned.choices[0].names[0] == "cuda-drivers-580"
    with pytest.raises(FleetError, match="the last branch that does is 580"):
        run(world, branch="595")
    with pytest.raises(FleetError, match="proprietary kernel modules only"):
        run(world, flavour="open")


def test_other_package_sets_of_the_same_driver_are_accepted(world: DriverWorld) -> None:
    world.install_driver("580.95.05")
    world.configured()
    del world.packages["nvidia-open-580"]
    assert not run(world).changed


# -- Secure Boot


def test_secure_boot_without_an_enrolled_key_installs_nothing(world: DriverWorld) -> None:
    world.files[SECURE_BOOT] = b"\x06\x00\x00\x00\x01"
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason == "secure_boot_key_not_enrolled"
    assert "mokutil --import /var/lib/shim-signed/mok/MOK.der" in caught.value.message
    assert "nothing was installed" in caught.value.message
    assert world.packages == {}
    assert world.ran("apt-get|update-initramfs") == []


def test_secure_boot_with_the_key(world: DriverWorld) -> None:
    world.files[SECURE_BOOT] = b"\x06\x00\x00\x00\x01"
    world.files["/var/lib/dkms/mok.pub"] = b"key"
    world.commands["mokutil --test-key *"] = (1, "/var/lib/dkms/mok.pub is already enrolled\n", "")
    assert run(world).changed


def test_secure_boot_on_the_operators_word(world: DriverWorld) -> None:
    world.files[SECURE_BOOT] = b"\x06\x00\x00\x00\x01"
    assert run(world, secure_boot="enrolled").changed


def test_secure_boot_off_or_absent(host: FakeHost) -> None:
    assert not secure_boot_enabled(host)
    host.files[SECURE_BOOT] = b"\x06\x00\x00\x00\x00"
    assert not secure_boot_enabled(host)
    host.files[SECURE_BOOT] = b"\x06\x00\x00\x00\x01"
    assert secure_boot_enabled(host)
    del host.files[SECURE_BOOT]
    host.dirs.add("/sys/firmware/efi")
    host.commands["mokutil --sb-state"] = "SecureBoot enabled\n"
    assert secure_boot_enabled(host)


# -- interrupted and broken


def test_repository_written_but_packages_missing(world: DriverWorld) -> None:
    world.configured()
    outcome = run(world)
    assert actions(outcome) == ["headers", "packages", "hold"]


def test_interrupted_dpkg_is_finished_first(world: DriverWorld) -> None:
    world.install_driver("580.95.05", loaded=False)
    world.configured()
    world.packages["nvidia-dkms-580-open"][1] = "hF"
    outcome = run(world)
    assert actions(outcome) == ["repair"]
    assert world.ran("dpkg .*--configure -a")
    assert world.packages["nvidia-dkms-580-open"][1] == "hi"


def test_interrupted_everywhere(world: DriverWorld) -> None:
    """Power went while packages were configured: nothing held yet, a service not enabled yet."""
    world.install_driver("580.95.05", loaded=False, held=False)
    world.configured()
    for name in world.packages:
        world.packages[name][1] = "iU"
    world.module = ""
    world.unit_state["nvidia-persistenced.service"] = ["inactive", "disabled"]
    outcome = run(world)
    assert actions(outcome)[0] == "repair"
    assert world.packages["nvidia-open-580"][1] == "hi"
    assert world.unit_state["nvidia-persistenced.service"][1] == "enabled"
    assert not run(world).changed


def test_a_half_installed_branch_that_cannot_be_finished_is_replaced(world: DriverWorld) -> None:
    world.build_fails = "580.82.07"
    with pytest.raises(FleetError) as caught:
        run(world, version="580.82.07")
    assert caught.value.reason == "dkms_build_failed"
    assert "error: implicit declaration of function 'follow_pfn'" in caught.value.message
    assert "make.log" in caught.value.message
    outcome = run(world, version="580.95.05")
    assert actions(outcome)[0] == "repair"
    assert world.packages["nvidia-open-580"] == ["580.95.05-0ubuntu1", "hi"]
    assert not run(world, version="580.95.05").changed


def test_what_another_tool_is_installing_is_left_to_it(world: DriverWorld) -> None:
    world.install_driver("580.95.05")
    world.packages["nvidia-dkms-580-open"][1] = "iU"
    said = "dpkg: error: dpkg frontend lock was locked by another process with pid 7\n"
    world.commands["dpkg --force-confdef *"] = (2, "", said)
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason == "package_lock"
    assert not world.ran("apt-get .*purge")


def test_a_download_waits_for_another_tool(world: DriverWorld) -> None:
    said = "E: Could not get lock /var/cache/apt/archives/lock. It is held by process 7 (apt-get)\n"
    answers = [(100, "", said)] * 2
    world.commands = {"apt-get * --download-only *": lambda *_: answers.pop() if answers else "", **world.commands}
    before = world.clock
    run(world)
    assert not answers and world.clock - before == 4


def test_strangers_that_cannot_be_finished_are_left(world: DriverWorld) -> None:
    world.packages["postfix"] = ["3.8-1", "iF"]
    world.commands["dpkg --force-confdef *"] = (1, "", "dpkg: error processing package postfix\n")
    with pytest.raises(FleetError, match="interrupted installation failed"):
        run(world)
    assert "postfix" in world.packages


def test_installation_that_fails_after_unloading_says_so_and_continues_later(world: DriverWorld) -> None:
    world.install_driver("535.183.06", flavour="")
    world.unit_state = {"nvidia-persistenced.service": ["active", "enabled"]}
    world.fail_install = 2  # headers are there; the driver's transaction and its retry
    with pytest.raises(FleetError) as caught:
        run(world)
    assert "running the role again continues here" in caught.value.message
    assert caught.value.facts["changes"]
    world.fail_install = 0
    run(world)
    assert world.packages["nvidia-open-580"][0] == "580.95.05-0ubuntu1"
    assert b"nvidia-persistenced" in world.files["/run/gpu_fleet/driver-clients.json"]


def test_a_failed_transaction_is_not_taken_for_a_failed_build(world: DriverWorld) -> None:
    """The name dkms is in the names of packages."""
    real = world._apt_get

    def apt_get(host: object, argv: tuple[str, ...], stdin: object, env: object) -> object:
        if any(word.startswith("nvidia-open-580=") for word in argv) and "--download-only" not in argv:
            return (
                100,
                "",
                "E: Unable to correct problems\n nvidia-dkms-580-open : Depends: dkms but it is not going to be installed\n",
            )
        return real(host, argv, stdin, env)

    world.commands["apt-get *"] = apt_get
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason != "dkms_build_failed"


def test_broken_holds_are_mended(world: DriverWorld) -> None:
    world.install_driver("580.95.05")
    world.configured()
    world.packages["libnvidia-compute-580"][1] = "ii"
    outcome = run(world)
    assert actions(outcome) == ["hold"]
    assert outcome.changes[0].before == "not held: libnvidia-compute-580"
    assert world.ran("apt-mark hold") == ["apt-mark hold libnvidia-compute-580"]


def test_holds_are_released_when_they_are_ours(world: DriverWorld) -> None:
    world.install_driver("580.95.05")
    world.configured()
    outcome = run(world, hold=False)
    assert actions(outcome) == ["unhold", "file"]
    assert world.packages["nvidia-open-580"][1] == "ii"
    assert UNATTENDED not in world.files
    # Holds that somebody else set are left.
    world.packages["nvidia-open-580"][1] = "hi"
    assert not run(world, hold=False).changed


def test_the_module_is_rebuilt_after_a_kernel_upgrade(world: DriverWorld) -> None:
    world.install_driver("580.95.05", loaded=False)
    world.configured()
    world.module = ""
    outcome = run(world)
    assert actions(outcome) == ["build"]
    assert outcome.state.on_disk == "580.95.05"


def test_a_module_that_dkms_was_told_to_forget_is_built_from_the_packages_sources(world: DriverWorld) -> None:
    world.install_driver("580.95.05", loaded=False)
    world.configured()
    world.module = ""
    world.dirs.add("/usr/src/nvidia-580.95.05")

    def install(*_arguments: object) -> str:
        world.module = "580.95.05"
        return ""

    world.commands = {"dkms autoinstall *": "", "dkms install nvidia/580.95.05 *": install, **world.commands}
    outcome = run(world)
    assert actions(outcome) == ["build"]
    assert outcome.state.on_disk == "580.95.05"


def test_missing_headers_are_installed_and_named_when_they_cannot_be(world: DriverWorld) -> None:
    world.commands = {
        "apt-get * linux-headers-*": (100, "", "E: Unable to locate package linux-headers-%s\n" % KERNEL),
        **world.commands,
    }
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason == "kernel_headers_unavailable"
    assert KERNEL in caught.value.message
    assert "nvidia-open-580" not in world.packages
    # Found out before anything was changed.
    assert not [path for path in world.files if "nvidia-cuda" in path or path in (PREFERENCES, BLACKLIST, UNATTENDED)]


def test_check_mode_says_that_headers_are_not_on_offer(world: DriverWorld) -> None:
    real = world.commands.pop("apt-cache madison *")

    def madison(host: object, argv: tuple[str, ...], stdin: object, env: object) -> object:
        if "linux-headers-" + KERNEL in argv:
            return ""
        if "linux-headers-generic" in argv:
            return "linux-headers-generic | 6.8.0-90.91 | http://archive.ubuntu.com/ubuntu noble/main amd64 Packages\n"
        return real(host, argv, stdin, env) if callable(real) else real

    world.commands["apt-cache madison *"] = madison
    outcome = run(world, check=True)
    with pytest.raises(FleetError, match="the package lists of the host do not have linux-headers-" + KERNEL):
        NvidiaDriver().result(outcome.state)


# -- headers of the kernels that upgrades bring


def debian(world: DriverWorld, flavour: str = "amd64") -> None:
    """Its kernel follows the metapackage of the flavour."""
    world.files["/etc/os-release"] = b"ID=debian\nVERSION_ID=12\nVERSION_CODENAME=bookworm\nPRETTY_NAME=Debian 12\n"
    world.release = "6.1.0-18-" + flavour
    world.packages["linux-image-" + flavour] = ["6.1.76-1", "ii"]


def offer(world: DriverWorld, *names: str) -> None:
    real = world._madison

    def madison(host: object, argv: tuple[str, ...], *rest: object) -> str:
        lines = ["%s | 6.1.133-1 | http://deb.test bookworm/main Packages\n" % name for name in argv if name in names]
        return real(host, argv, *rest) + "".join(lines)

    world.commands["apt-cache madison *"] = madison


@pytest.mark.parametrize("flavour", ["amd64", "cloud-amd64"])
def test_headers_follow_the_metapackage_of_the_kernel(world: DriverWorld, flavour: str) -> None:
    """dkms needs those of the kernel that an unattended upgrade brings before that kernel boots."""
    debian(world, flavour)
    offer(world, "linux-headers-6.1.0-18-" + flavour, "linux-headers-" + flavour, "linux-headers-amd64")
    planned = run(world, check=True)
    # After the driver: an older one may not build for those kernels.
    assert actions(planned)[0] == "headers"
    assert actions(planned).index("packages") < actions(planned).index("later_headers")
    done = run(world)
    assert actions(done) == actions(planned)
    assert world.packages["linux-headers-" + flavour][1] == "ii"
    assert not run(world).changed
    # A host from before.
    del world.packages["linux-headers-" + flavour]
    outcome = run(world)
    assert [(change.what, change.after) for change in outcome.changes] == [
        ("package linux-headers-" + flavour, "installed")
    ]
    world.dirs.add("/lib/modules/%s/build" % world.release)
    world.calls.clear()
    assert not run(world).changed
    assert not world.ran("apt-cache")


#: Of a kernel that has not booted yet, and the metapackage that wants them.
NEWER = ("linux-headers-6.1.0-40-amd64", "linux-headers-amd64")


def test_headers_for_which_the_driver_does_not_build_are_not_left_half_configured(world: DriverWorld) -> None:
    """dkms fails in the postinst of the headers, and dpkg would fail at every later call."""
    debian(world)
    offer(world, "linux-headers-6.1.0-18-amd64", *NEWER)
    real = world._apt_get

    def apt_get(host: object, argv: tuple[str, ...], *rest: object) -> object:
        if "linux-headers-amd64" in argv and "install" in argv:
            world.packages.update({NEWER[0]: ["6.1.150-1", "iF"], NEWER[1]: ["6.1.150-1", "iU"]})
            return (100, "", "E: Sub-process /usr/bin/dpkg returned an error code (1)\n")
        return real(host, argv, *rest)

    world.commands["apt-get *"] = apt_get
    for _run in range(2):
        with pytest.raises(FleetError) as caught:
            run(world)
        assert caught.value.reason == "package_failed"
        assert "does not build for the kernel that upgrades bring" in caught.value.message
        assert not set(NEWER) & set(world.packages)
        assert world.packages["nvidia-open-580"][1] == "hi"
    # What the message advises.
    assert not run(world, kernel_headers=False).changed


def test_headers_that_an_upgrade_could_not_configure_give_way_to_the_driver_that_builds(world: DriverWorld) -> None:
    debian(world)
    offer(world, "linux-headers-6.1.0-18-amd64", *NEWER)
    run(world)
    world.packages.update({NEWER[0]: ["6.1.150-1", "iF"], NEWER[1]: ["6.1.150-1", "iU"]})
    real = world._configure

    def configure(host: object, argv: tuple[str, ...], *rest: object) -> object:
        if any(name in world.packages and world.packages[name][1] != "ii" for name in NEWER):
            return (1, "", "dpkg: error processing package %s (--configure):\n" % NEWER[0])
        return real(host, argv, *rest)

    world.commands["dpkg --force-confdef *"] = configure
    assert actions(run(world)) == ["repair", "later_headers"]
    assert world.packages["linux-headers-amd64"][1] == "ii"
    assert not run(world).changed
    # Those of the running kernel are nobody's to remove.
    world.packages["linux-headers-6.1.0-18-amd64"][1] = "iF"
    world.commands["dpkg --force-confdef *"] = (1, "", "dpkg: error processing package linux-headers-6.1.0-18-amd64\n")
    with pytest.raises(FleetError):
        run(world)
    assert "linux-headers-6.1.0-18-amd64" in world.packages


@pytest.mark.parametrize("offered", [["linux-headers-6.1.0-18-amd64", "linux-headers-arm64"], []], ids=["others", "no"])
def test_headers_that_are_not_on_offer_are_not_missed(world: DriverWorld, offered: list[str]) -> None:
    debian(world)
    offer(world, *offered)
    said = (100, "", "E: Unable to locate package linux-headers-amd64\n")
    world.commands = {"apt-get * linux-headers-amd64": said, **world.commands}
    # Of lists without any headers the installation makes new ones, and only then it is known.
    assert ("later_headers" in actions(run(world))) is not offered
    assert "nvidia-open-580" in world.packages
    assert not run(world).changed


def test_headers_of_later_kernels_where_the_lists_come_during_the_run(world: DriverWorld) -> None:
    """An image with headers and without package lists: no second run finds more."""
    debian(world)
    world.packages["linux-headers-6.1.0-18-amd64"] = ["6.1.76-1", "ii"]
    real = world._apt_get

    def apt_get(host: object, argv: tuple[str, ...], *rest: object) -> object:
        offer(world, "linux-headers-amd64")
        return real(host, argv, *rest)

    world.commands["apt-get *"] = apt_get
    assert "later_headers" in actions(run(world))
    assert not run(world).changed


@pytest.mark.parametrize("options", [{"kernel_headers": False}, {"kernel_module": False}])
def test_headers_of_later_kernels_that_are_not_wanted(world: DriverWorld, options: dict[str, bool]) -> None:
    debian(world)
    offer(world, "linux-headers-amd64")
    assert "later_headers" not in actions(run(world, check=True, **options))


def test_a_kernel_that_no_metapackage_brings(world: DriverWorld) -> None:
    debian(world)
    del world.packages["linux-image-amd64"]
    offer(world, "linux-headers-6.1.0-18-amd64", "linux-headers-amd64")
    assert "later_headers" not in actions(run(world))
    assert "linux-headers-amd64" not in world.packages


def test_headers_of_later_kernels_that_cannot_be_installed(world: DriverWorld) -> None:
    debian(world)
    offer(world, "linux-headers-6.1.0-18-amd64", "linux-headers-amd64")
    said = "linux-headers-amd64 : Depends: linux-headers-6.1.0-33-amd64 but it is not installable\n"
    world.commands = {"apt-get * linux-headers-amd64": (100, said, "E: Unable to correct problems\n"), **world.commands}
    with pytest.raises(FleetError, match=r"linux-headers-6\.1\.0-33-amd64") as caught:
        run(world)
    assert caught.value.reason == "package_failed"
    assert "nvidia_driver_kernel_headers to false" in caught.value.message
    assert world.packages["nvidia-open-580"][1] == "hi"


def test_without_a_kernel_module_nothing_is_said_about_one(world: DriverWorld) -> None:
    outcome = run(world, kernel_module=False)
    answer = NvidiaDriver(kernel_module=False).result(outcome.state)
    assert answer["message"].startswith("Driver 580.95.05 is installed without a kernel module")


def test_user_space_follows_a_module_from_elsewhere(world: DriverWorld) -> None:
    world.load("580.65.06")
    world.module = "580.65.06"
    outcome = run(world, kernel_module=False)
    assert world.packages["nvidia-headless-no-dkms-580-open"][0].startswith("580.65.06")
    assert not [name for name in world.packages if re.search(r"(?<!no-)dkms", name)]
    assert not world.ran("rmmod|modprobe|dkms autoinstall")
    assert outcome.state.loaded_version == "580.65.06"
    assert [change.disruption for change in outcome.changes if change.action == "packages"] == [Disruption.NONE]
    assert not run(world, kernel_module=False).changed


@pytest.mark.parametrize("options", [{"branch": "570"}, {"version": "580.95.05"}])
def test_user_space_that_does_not_fit_a_module_from_elsewhere(world: DriverWorld, options: dict[str, str]) -> None:
    world.load("580.65.06")
    with pytest.raises(FleetError, match=r"is 580\.65\.06, .* choose branch 580") as caught:
        run(world, kernel_module=False, **options)
    assert caught.value.reason == "driver_mismatch"
    assert not world.packages


def test_a_build_without_headers_says_so(world: DriverWorld) -> None:
    world.install_driver("580.95.05", loaded=False)
    world.configured()
    world.module = ""
    world.dirs.discard("/lib/modules/%s/build" % KERNEL)
    with pytest.raises(FleetError, match="the headers of kernel %s are missing" % KERNEL):
        run(world, kernel_headers=False)


def test_initramfs_failure_leaves_no_blacklist_behind(world: DriverWorld) -> None:
    world.commands["update-initramfs *"] = (1, "", "update-initramfs: failed: No space left on device")
    with pytest.raises(FleetError) as caught:
        run(world)
    assert caught.value.reason == "initramfs_failed"
    assert BLACKLIST not in world.files


@pytest.mark.parametrize("before", [None, "blacklist nouveau\n"])
def test_initramfs_of_a_host_with_dracut(host: FakeHost, before: str | None) -> None:
    """All of EL; the blacklist and its copy in the initramfs: both, or neither."""
    if before is not None:
        host.files[BLACKLIST] = before.encode()
    host.commands["dracut *"] = (1, "", "dracut: installkernel failed in module kernel-modules\n")
    with pytest.raises(FleetError) as caught:
        write_blacklist(host)
    assert caught.value.reason == "initramfs_failed"
    assert "(dracut) failed: dracut: installkernel failed in module kernel-modules. Mend that" in caught.value.message
    assert host.read_text(BLACKLIST) == before

    host.commands["dracut *"] = ""
    write_blacklist(host)
    assert host.calls[-1] == ("dracut", "--force", "--regenerate-all")
    assert host.read_text(BLACKLIST) == BLACKLIST_CONTENT


@pytest.mark.parametrize("command", ["update-initramfs -u -k all", "dracut --force --regenerate-all"])
def test_the_initramfs_forgets_the_blacklist_too(host: FakeHost, command: str) -> None:
    host.files[BLACKLIST] = BLACKLIST_CONTENT.encode()
    host.dirs.add("/etc/modprobe.d")
    host.commands[command] = (1, "", "No space left on device")
    with pytest.raises(FleetError, match=r"Rebuilding the initramfs without the blacklist of nouveau \("):
        remove_blacklist(host)
    assert BLACKLIST in host.files

    host.commands[command] = ""
    remove_blacklist(host)
    assert " ".join(host.calls[-1]) == command
    assert BLACKLIST not in host.files


def test_a_host_without_an_initramfs(host: FakeHost) -> None:
    write_blacklist(host)
    assert BLACKLIST in host.files
    remove_blacklist(host)
    assert BLACKLIST not in host.files
    assert host.calls == []


def test_a_runfile_driver_is_not_fought(world: DriverWorld) -> None:
    world.files["/usr/bin/nvidia-uninstall"] = b""
    world.load("580.95.05")
    with pytest.raises(FleetError, match="nvidia-uninstall"):
        run(world)


def test_packages_of_others_are_not_removed_along(world: DriverWorld) -> None:
    world.install_driver("535.183.06", flavour="", loaded=False)
    world.commands = {"apt-get -s *": "Purg nvidia-driver-535 [535]\nRemv my-cuda-app [1.0]\n", **world.commands}
    with pytest.raises(FleetError, match="would remove my-cuda-app"):
        run(world)
    assert "nvidia-driver-535" in world.packages


def test_version_not_available(world: DriverWorld) -> None:
    with pytest.raises(FleetError, match=r"on offer: 580\.95\.05-0ubuntu1, 580\.82\.07-0ubuntu1, 580\.65\.06-0ubuntu1"):
        run(world, version="580.11.11")


# -- hardware that asks for more


def test_fabric_manager_where_switches_are(world: DriverWorld) -> None:
    world.files["/sys/bus/pci/devices/0000:c0:00.0/vendor"] = b"0x10de\n"
    world.files["/sys/bus/pci/devices/0000:c0:00.0/class"] = b"0x068000\n"
    world.unit_state["nvidia-fabricmanager.service"] = ["inactive", "disabled"]
    run(world)
    assert world.packages["nvidia-fabricmanager"] == ["580.95.05-1", "hi"]
    assert world.packages["libnvidia-nscq"][0] == "580.95.05-1"
    assert world.unit_state["nvidia-fabricmanager.service"] == ["inactive", "enabled"]
    world.unit_state["nvidia-fabricmanager.service"][1] = "disabled"
    assert actions(run(world)) == ["enable"]
    assert not run(world).changed
    # A different version of it is an outage: the driver and Fabric Manager must agree exactly.
    world.packages["nvidia-fabricmanager"][0] = "580.65.06-1"
    assert "packages" in actions(run(world))
    assert world.packages["nvidia-fabricmanager"][0] == "580.95.05-1"
    assert "nvidia-fabricmanager" not in {
        name
        for choice in NvidiaDriver(fabric_manager="absent").package_plan(NvidiaDriver().observe(world)).choices
        for name in choice.names
    }


@pytest.mark.parametrize(
    ("device", "switches", "fabric", "imex", "wanted"),
    [
        ("0x2335", "", "auto", "auto", set()),
        ("0x2335", "bridge", "auto", "auto", {"nvidia-fabricmanager", "libnvidia-nscq"}),
        ("0x2901", "vpd", "auto", "auto", {"nvidia-fabricmanager", "libnvidia-nscq", "nvlsm", "infiniband-diags"}),
        (
            "0x2941",
            "vpd",
            "auto",
            "auto",
            {"nvidia-fabricmanager", "libnvidia-nscq", "nvlsm", "infiniband-diags", "nvidia-imex"},
        ),
        ("0x2941", "vpd", "absent", "absent", set()),
        ("0x2335", "", "present", "present", {"nvidia-fabricmanager", "libnvidia-nscq", "nvidia-imex"}),
    ],
)
@pytest.mark.parametrize("branch", ["580", "590"])
def test_companions_are_what_the_hardware_asks_for(
    device: str, switches: str, fabric: str, imex: str, wanted: set[str], branch: str
) -> None:
    world = DriverWorld(device=device)
    if switches == "bridge":
        world.files["/sys/bus/pci/devices/0000:c0:00.0/vendor"] = b"0x10de\n"
        world.files["/sys/bus/pci/devices/0000:c0:00.0/class"] = b"0x068000\n"
    elif switches == "vpd":
        world.files["/sys/class/infiniband/mlx5_0/device/vpd"] = b"\x82\x10\x00xSW_MNGx"
    driver = NvidiaDriver(branch=branch, fabric_manager=fabric, imex=imex)
    choices = driver.package_plan(driver.observe(world)).choices
    companions = re.compile(r"nvidia-fabric-?manager|libnvidia-nscq|nvidia-imex|nvlsm|infiniband-diags")
    assert {choice.names[0] for choice in choices if companions.match(choice.names[0])} == wanted
    # In lockstep with the driver, but for what has versions of its own.
    assert {choice.names[0] for choice in choices if not choice.versioned} == wanted & {"nvlsm", "infiniband-diags"}


# -- Debian's own packages


def test_components_of_debian() -> None:
    world = DriverWorld()
    world.files["/etc/os-release"] = b"ID=debian\nVERSION_ID=12\nVERSION_CODENAME=bookworm\nPRETTY_NAME=Debian 12\n"
    world.files["/etc/apt/sources.list"] = b"deb [signed-by=/k.gpg] http://deb.test/debian bookworm main contrib\n"
    planned = run(world, check=True, source="distribution", branch="535")
    change = next(change for change in planned.changes if change.action == "components")
    assert change.before == "contrib main"
    assert change.data["components"] == ["non-free", "non-free-firmware"]
    NvidiaDriver(source="distribution", branch="535").apply(world, change)
    assert world.files[NON_FREE].decode().splitlines()[1:] == [
        "Types: deb",
        "URIs: http://deb.test/debian",
        "Suites: bookworm",
        "Components: non-free non-free-firmware",
        "Signed-By: /k.gpg",
    ]
    assert "components" not in actions(run(world, check=True, source="distribution", branch="535"))


def test_debian_source_copies_what_is_there(host: FakeHost) -> None:
    host.files["/etc/apt/sources.list.d/debian.sources"] = (
        b"Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\nComponents: main\n"
        b"Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )
    text = debian_source(host, BOOKWORM, ["non-free"])
    assert "URIs: http://mirror.test/debian\n" in text
    assert "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n" in text
    host.files["/etc/apt/sources.list.d/debian.sources"] = b""
    assert "URIs: http://deb.debian.org/debian\n" in debian_source(host, BOOKWORM, ["non-free"])
    host.files["/etc/apt/sources.list"] = b"deb http://plain.test/debian bookworm main\n"
    assert "Signed-By" not in debian_source(host, BOOKWORM, ["non-free"])


# -- EL


def el_host() -> DriverWorld:
    world = DriverWorld()
    world.files["/etc/os-release"] = (
        b'ID=rocky\nVERSION_ID=9.4\nID_LIKE="rhel centos fedora"\nPRETTY_NAME="Rocky Linux 9.4"\n'
    )
    world.commands = {
        "rpm -qa *": "",
        "modinfo *": (1, "", ""),
        "systemctl *": "",
        "dnf *": "",
    }
    return world


def test_streams_are_reset_before_another_is_enabled() -> None:
    world = el_host()
    world.files["/etc/dnf/modules.d/nvidia-driver.module"] = (
        b"[nvidia-driver]\nname=nvidia-driver\nstream=570-open\nprofiles=\nstate=enabled\n"
    )
    planned = run(world, check=True)
    change = next(change for change in planned.changes if change.action == "stream")
    assert (change.before, change.after) == ("570-open", "580-open")
    NvidiaDriver().apply(world, change)
    assert world.ran("^dnf -q -y") == [
        "dnf -q -y --setopt=*.metadata_expire=-1 module reset nvidia-driver",
        "dnf -q -y --setopt=*.metadata_expire=-1 module enable nvidia-driver:580-open",
    ]
    world.files["/etc/dnf/modules.d/nvidia-driver.module"] = b"[nvidia-driver]\nstream=580-open\nstate=enabled\n"
    assert "stream" not in actions(run(world, check=True))


def test_el_needs_no_apt_files() -> None:
    planned = run(el_host(), check=True)
    paths = {change.what for change in planned.changes}
    assert UNATTENDED not in paths
    assert PREFERENCES not in paths
    assert any("kernel-devel-" + KERNEL in path for path in paths)


def test_locks_on_el_are_released_when_they_are_ours() -> None:
    world = el_host()
    lock_file = "/etc/dnf/plugins/versionlock.list"
    names = ("kmod-nvidia-open-dkms", "nvidia-driver-cuda", "nvidia-persistenced")
    world.commands["rpm -qa *"] = "".join("%s\t3:580.95.05-1.el9\tx86_64\n" % name for name in names)
    world.commands = {
        "rpm -q python3-dnf-plugin-versionlock": "",
        "dnf -q -y --setopt=*.metadata_expire=-1 versionlock *": versionlock,
        **world.commands,
    }
    # One lock is the operator's.
    world.files[lock_file] = b"nvidia-persistenced-3:580.95.05-1.el9.*\n"
    driver = NvidiaDriver()
    hold = next(change for change in driver.plan(driver.observe(world)) if change.action == "hold")
    driver.apply(world, hold)
    assert world.files[LOCKED] == b"kmod-nvidia-open-dkms\nnvidia-driver-cuda\n"
    assert len(world.files[lock_file].splitlines()) == 3

    loose = NvidiaDriver(hold=False)
    release = next(change for change in loose.plan(loose.observe(world)) if change.action == "unhold")
    loose.apply(world, release)
    assert world.files[lock_file] == b"nvidia-persistenced-3:580.95.05-1.el9.*\n"
    assert not [change for change in loose.plan(loose.observe(world)) if change.what == "package holds"]


def versionlock(host: FakeHost, argv: tuple[str, ...], _stdin: object, _env: object) -> str:
    path = "/etc/dnf/plugins/versionlock.list"
    lines = (host.read_text(path) or "").splitlines()
    lines = [line for line in lines if not any(line.startswith(name + "-3:") for name in argv[6:])]
    if argv[5] == "add":
        lines += ["%s-3:580.95.05-1.el9.*" % name for name in argv[6:]]
    host.files[path] = "".join(line + "\n" for line in lines).encode()
    return ""
