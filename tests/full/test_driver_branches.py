# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every branch of the driver and every version of the toolkit in the sandbox's repositories: there, on to the next, back, gone.

About five minutes. .venv/bin/pytest -v tests/full/test_driver_branches.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import pytest
from fleet_testing import SOURCE, Fleet, Host, Run, sandbox, wait_until

sys.path.insert(0, str(SOURCE / "repositories"))

from driver import BRANCHES, BRANCHLESS

DRIVER = ("--tags", "nvidia_driver")
TOOLKIT = ("--tags", "docker,nvidia_container_toolkit")
TOOLKIT_PACKAGES = (
    "libnvidia-container-tools",
    "libnvidia-container1",
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
)
#: Somebody uses a GPU when this branch is asked for.
IN_USE = 555
#: The kernel does not let go of the driver when this branch is asked for.
ONLY_BY_REBOOT = 575
BACK_TO = 550
#: One name in all branches, and of use to an older driver: a newer one stays on the way back, without being held.
INDEPENDENT = {"nvidia-modprobe", "nvidia-settings"}
HARDWARE = "/etc/sandbox/hardware.json"


@pytest.fixture
def fleet(worker_id: str) -> Iterator[Fleet]:
    """A bare host."""
    scenario = "branches-" + worker_id
    sandbox("remove", "--scenario", scenario)
    sandbox("add", "gpu01", "--scenario", scenario, "--image", "ubuntu2404", "--gpus", "NVIDIA H200:143771:2")
    yield Fleet(scenario, {"gpu_hosts": {"vars": {}}})
    sandbox("remove", "--scenario", scenario)


@pytest.fixture
def host(fleet: Fleet) -> Host:
    return fleet.host("gpu01")


def packages(host: Host) -> dict[str, str]:
    """Versions and states of the driver's and the toolkit's packages, as dpkg has them."""
    listed = host.run(
        "dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\\n' '*nvidia*' '*cuda*'", check=False
    )
    lines = [line.split(" ", 1) for line in listed.splitlines() if not line.startswith("dpkg-query")]
    return {name: rest.strip() for name, rest in lines if not rest.strip().endswith("un")}


def versions(host: Host) -> dict[str, str]:
    """The driver's version, asked for in every place that has one; empty where there is none."""
    commands = {
        "loaded": "cat /sys/module/nvidia/version",
        "on disk": "modinfo --field version nvidia",
        "user space": "readlink /usr/lib/x86_64-linux-gnu/libcuda.so.1 | sed s/^libcuda.so.//",
        "nvidia-smi": "nvidia-smi --query-gpu=driver_version --format=csv,noheader | sort -u",
    }
    return {place: host.run(command + " 2>/dev/null", check=False) for place, command in commands.items()}


def is_everywhere(host: Host, branch: int) -> None:
    """The newest version of a branch and no other, of which the packages are held."""
    wanted = BRANCHES[branch][1][-1]
    assert set(versions(host).values()) == {wanted}, versions(host)
    present = packages(host)
    numbered = {int(found) for name in present for found in re.findall(r"-(\d{3})\b", name)}
    # From 590 on only the package that pins the branch has its number.
    assert numbered == {branch}, present
    assert ("nvidia-driver-pinning-%d" % branch in present) is (branch >= BRANCHLESS), present
    loose = {name for name, state in present.items() if not state.endswith(" hi")}
    assert loose <= (INDEPENDENT if branch == BACK_TO else set()), present
    assert host.run("systemctl is-active nvidia-persistenced") == "active"
    assert host.run("dpkg --audit") == ""


def asks_for(branch: int, **variables: object) -> dict[str, object]:
    return {"gpu_hosts": {"vars": {"nvidia_driver_branch": str(branch), **variables}}}


def is_left_to_its_user(fleet: Fleet, host: Host, change: str) -> None:
    """Neither another branch nor a removal takes the GPU from a process; both name it."""
    script = "import time; held = open('/dev/nvidia1'); time.sleep(900)"
    host.run('systemd-run --quiet --unit=training python3 -c "%s"' % script)
    try:
        pid = host.run("systemctl show --property MainPID --value training")
        wait_until(lambda: "nvidia1" in host.run("ls -l /proc/%s/fd" % pid), "the job has opened its GPU")
        before = packages(host), versions(host)
        if change == "remove":
            run = fleet.play("remove", "-e", "remove_driver=true", succeeds=False)
            assert "stop them first" in run.output
        else:
            run = fleet.site(*DRIVER, inventory=asks_for(int(change)), succeeds=False)
            assert "training.service" in run.failure(host.name) and "Nothing was changed" in run.failure(host.name)
            assert run.changed() == []
        assert re.search(r"\bpid %s\b" % pid, run.output), run.output
        assert (packages(host), versions(host)) == before
    finally:
        host.run("systemctl stop training")


def comes_by_reboot_only(fleet: Fleet, host: Host, branch: int) -> Run:
    """What keeps the module in the kernel is no process: a reboot is asked for, and made when it is allowed."""
    hardware = host.read_json(HARDWARE)
    host.write(HARDWARE, json.dumps({**hardware, "needs_reboot": True}))
    before, boot = versions(host)["loaded"], host.boot_id()
    run = fleet.site(*DRIVER, inventory=asks_for(branch), succeeds=False)
    message = run.failure(host.name)
    assert "a reboot is needed because" in message and "nvidia_driver_reboot" in message, message
    assert [entry for entry in run.of(host.name) if entry["result"].get("reboot_required")]
    assert (versions(host)["loaded"], host.boot_id()) == (before, boot)
    # Installed it is.
    assert versions(host)["on disk"].startswith("%d." % branch)

    run = fleet.site(*DRIVER, inventory=asks_for(branch, nvidia_driver_reboot=True))
    assert host.boot_id() != boot
    host.write(HARDWARE, json.dumps(hardware))
    return run


def test_every_branch_of_the_driver(fleet: Fleet, host: Host) -> None:
    assert {IN_USE, ONLY_BY_REBOOT, BACK_TO} < set(BRANCHES)
    for branch in (*sorted(BRANCHES), BACK_TO):
        boot = host.boot_id()
        if branch == IN_USE:
            is_left_to_its_user(fleet, host, str(branch))
        if branch == ONLY_BY_REBOOT:
            run = comes_by_reboot_only(fleet, host, branch)
        else:
            run = fleet.site(*DRIVER, inventory=asks_for(branch))
            assert host.boot_id() == boot
        assert run.changed() != []
        is_everywhere(host, branch)
        assert fleet.site(*DRIVER, inventory=asks_for(branch)).changed() == []

    is_left_to_its_user(fleet, host, "remove")
    is_removed(fleet, host)


def is_removed(fleet: Fleet, host: Host) -> None:
    """The driver, by the playbook; what is in memory until the next boot too."""
    run = fleet.play("remove", "-e", "remove_driver=true")
    assert run.changed() != [] and "a reboot takes it out of memory" in run.output
    assert packages(host) == {}
    assert fleet.play("remove", "-e", "remove_driver=true").changed() == []
    host.reboot(180)
    assert set(versions(host).values()) == {""}, versions(host)
    assert "nvidia" not in host.run("apt-mark showhold; ls /etc/apt/preferences.d /etc/apt/sources.list.d")


def test_every_version_of_the_toolkit(fleet: Fleet, host: Host) -> None:
    newest = max(BRANCHES)
    fleet.site("--tags", "nvidia_driver,docker", inventory=asks_for(newest))
    # Its own image: nothing of the collection's.
    image = "nvcr.io/nvidia/cuda:12.8.1-base-ubuntu24.04"
    gpus = "--runtime=nvidia --env NVIDIA_VISIBLE_DEVICES=all --entrypoint"
    serving = ""
    for asked, version in (("1.17", "1.17.8-1"), ("1.20", "1.20.0-1"), ("1.17", "1.17.8-1")):
        inventory = asks_for(newest, nvidia_container_toolkit_version=asked)
        run = fleet.site(*TOOLKIT, inventory=inventory)
        assert run.changed() != []
        smoke_tests = {
            str(entry["result"].get("smoke_test")) for entry in run.of(host.name, "Containers can use the GPUs")
        }
        assert "passed" in smoke_tests, run.output
        found = packages(host)
        assert {name: found.get(name) for name in TOOLKIT_PACKAGES} == dict.fromkeys(TOOLKIT_PACKAGES, version + " hi")
        assert host.run("nvidia-ctk --version").splitlines()[0].endswith(version.partition("-")[0])
        listed = host.run("docker run --rm %s nvidia-smi %s -L" % (gpus, image)).splitlines()
        assert len([line for line in listed if line.startswith("GPU ")]) == 2, listed
        assert fleet.site(*TOOLKIT, inventory=inventory).changed() == []
        # A container that has its GPUs from the version before is not disturbed.
        if not serving:
            host.run("docker run --detach --name serving %s /bin/busybox %s sleep 3600" % (gpus, image))
            serving = runs(host)
        assert runs(host) == serving

    run = fleet.play("remove", "-e", "remove_toolkit=true")
    assert run.changed() != []
    assert not set(TOOLKIT_PACKAGES) & set(packages(host))
    assert "nvidia" not in host.run("docker info --format '{{json .Runtimes}}'")
    assert not host.succeeds("docker run --rm %s nvidia-smi %s -L" % (gpus, image))
    assert runs(host) == serving
    assert fleet.play("remove", "-e", "remove_toolkit=true").changed() == []
    # A branch without its number in the names goes as well.
    host.run("docker rm --force serving")
    is_removed(fleet, host)


def runs(host: Host) -> str:
    return host.run("docker inspect --format '{{.Id}} {{.State.Pid}} {{.State.StartedAt}}' serving")
