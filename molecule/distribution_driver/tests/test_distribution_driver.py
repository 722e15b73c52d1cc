# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from testinfra.host import Host

SCENARIO = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"])
VERSION = "550.163.01"
USER_SPACE = {"libcuda1", "libnvidia-ml1", "libnvidia-ptxjitcompiler1", "nvidia-driver-bin", "nvidia-smi"}
#: contrib has its own version of it.
OWN_VERSION = {"nvidia-modprobe"}
NON_FREE = "/etc/apt/sources.list.d/gpu-fleet-debian-non-free.sources"


def name(host: Host) -> str:
    return str(host.backend.get_hostname()).removeprefix("distribution-driver-")


def has_driver(host: Host) -> bool:
    return name(host) != "headers"


def packages(host: Host) -> dict[str, str]:
    lines = host.check_output("dpkg-query -W -f '${Package} ${Version} ${db:Status-Status}\\n'").splitlines()
    return {line.split()[0]: line.split()[1] for line in lines if line.endswith(" installed")}


def driver_packages(host: Host) -> dict[str, str]:
    pattern = r"(lib)?nvidia-|libcuda1$|firmware-nvidia"
    independent = r"nvidia-(support|installer-cleanup|kernel-common)$"
    return {
        package: version
        for package, version in packages(host).items()
        if re.match(pattern, package) and not re.match(independent, package)
    }


def test_a_last_check_finds_nothing_to_do() -> None:
    inventories = [SCENARIO / "inventory.yml", Path(os.environ["MOLECULE_PROJECT_DIRECTORY"]) / ".sandbox/inventories"]
    command = [
        "ansible-playbook",
        "--check",
        "-i",
        str(inventories[0]),
        "-i",
        str(inventories[1] / (SCENARIO.name + ".yml")),
    ]
    done = subprocess.run([*command, str(SCENARIO / "converge.yml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    recap = done.stdout.partition("PLAY RECAP")[2]
    assert recap.count("changed=0") == 3, done.stdout


def test_all_packages_have_one_version(host: Host) -> None:
    found = driver_packages(host)
    if not has_driver(host):
        assert found == {}
        return
    assert set(found) >= USER_SPACE
    versions = {re.split("-", version)[0] for package, version in found.items() if package not in OWN_VERSION}
    assert versions == {VERSION}
    assert ("nvidia-kernel-dkms" in found) == (name(host) == "module")
    # A server gets no graphical desktop for its driver.
    assert not [package for package in packages(host) if package.startswith(("xserver-", "nvidia-settings"))]
    assert host.check_output("dpkg --audit") == ""


def test_all_packages_are_held(host: Host) -> None:
    assert set(host.check_output("apt-mark showhold").split()) == set(driver_packages(host)) - OWN_VERSION


def test_unattended_upgrades_leave_the_driver_and_go_on(host: Host) -> None:
    assert host.package("unattended-upgrades").is_installed
    seen = host.run("unattended-upgrade --dry-run --debug")
    assert seen.rc == 0, seen.stderr
    initial = re.search(r"Initial blacklist: ?(.*)", seen.stdout + seen.stderr)
    assert initial is not None, seen.stdout + seen.stderr
    patterns = initial.group(1).split()
    for package in driver_packages(host):
        assert any(re.match(pattern, package) for pattern in patterns), package
    for package in ("nvidia-container-toolkit", "libnvidia-container1", "openssl", "linux-image-amd64"):
        assert not any(re.match(pattern, package) for pattern in patterns), package


def test_sources(host: Host) -> None:
    added = host.file(NON_FREE)
    if name(host) != "userspace":
        # It was there already, or nothing was to be changed.
        assert not added.exists
        return
    fields = dict(line.split(": ", 1) for line in added.content_string.splitlines() if not line.startswith("#"))
    assert fields == {
        "Types": "deb",
        "URIs": "http://deb.debian.org/debian",
        "Suites": "trixie",
        "Components": "contrib non-free",
        "Signed-By": "/usr/share/keyrings/debian-archive-keyring.gpg",
    }
    # What was there is as it was.
    assert "Components: main non-free-firmware\n" in host.file("/etc/apt/sources.list.d/debian.sources").content_string


def test_the_real_programs_and_libraries_work(host: Host) -> None:
    if not has_driver(host):
        assert not host.exists("nvidia-smi")
        return
    assert host.check_output("nvidia-smi --help").splitlines()[0] == "NVIDIA System Management Interface -- v" + VERSION
    # NVIDIA's own word for the CUDA version that this branch brings; needs no GPU.
    program = "import ctypes; v = ctypes.c_int(); ctypes.CDLL('libcuda.so.1').cuDriverGetVersion(ctypes.byref(v)); print(v.value)"
    assert host.check_output("python3 -c %s", program) == "12040"


def test_the_module_is_built_and_loaded(host: Host) -> None:
    if name(host) != "module":
        assert not host.file("/sys/module/nvidia").exists
        return
    kernel = host.check_output("uname -r")
    assert host.check_output("dkms status") == "nvidia-current/%s, %s, x86_64: installed" % (VERSION, kernel)
    # Debian gives the module another name; modprobe nvidia finds it through Debian's own configuration.
    assert host.check_output("modinfo -F version nvidia-current") == VERSION
    assert host.file("/sys/module/nvidia/version").content_string.strip() == VERSION


@pytest.mark.parametrize("path", ["/etc/modprobe.d/gpu-fleet-nouveau.conf", "/etc/apt/apt.conf.d/52gpu-fleet-nvidia"])
def test_a_refused_host_has_nothing_of_ours(host: Host, path: str) -> None:
    assert host.file(path).exists == has_driver(host)
