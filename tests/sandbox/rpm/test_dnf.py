# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Driver, toolkit and Docker Engine on look-alikes of EL 9 and EL 10: the collection's code with a real dnf and rpm.

pytest tests/sandbox/rpm          (needs root, mmdebstrap and Debian's package archive; two minutes the first time)
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import typing as t

import pytest
from machines import KERNELS, Machine

both = pytest.mark.parametrize("machine", [9, 10], ids=["el9", "el10"], indirect=True)
el9 = pytest.mark.parametrize("machine", [9], ids=["el9"], indirect=True)
el10 = pytest.mark.parametrize("machine", [10], ids=["el10"], indirect=True)

LOCKS = "/etc/dnf/plugins/versionlock.list"


def driver(machine: Machine, server: str, check: bool = False, **options: t.Any) -> dict[str, t.Any]:
    options = {"repository_url": server + "/compute/cuda/repos", **options}
    return machine.ask("converge", name="nvidia_driver", options=options, check=check)


def versions(machine: Machine, pattern: str = "nvidia") -> dict[str, str]:
    """Name -> version-release of the installed packages, as rpm itself says it."""
    form = "%{NAME} %{EPOCHNUM}:%{VERSION}-%{RELEASE}\\n"
    lines = machine.run("rpm", "-qa", "--qf", form).stdout.splitlines()
    return {name: version for name, version in (line.split() for line in lines) if re.search(pattern, name)}


def driver_versions(machine: Machine) -> set[str]:
    found = {name: one for name, one in versions(machine).items() if name.startswith(("nvidia-", "libnvidia", "kmod"))}
    return {re.sub(r"^\d+:|-.*", "", version) for version in found.values()}


def locks(machine: Machine) -> list[str]:
    return [line for line in machine.read(LOCKS).splitlines() if line and not line.startswith("#")]


def stream(machine: Machine) -> str:
    # With the lists that are there.
    listed = machine.run("dnf", "-q", "--setopt=*.metadata_expire=-1", "module", "list").stdout
    found = re.search(r"(?m)^\*?nvidia-driver +(\S+) \[e\]", listed)
    return found.group(1) if found else ""


def module_version(machine: Machine) -> str:
    return machine.run("modinfo", "-k", KERNELS[machine.major], "-F", "version", "nvidia").stdout.strip()


def whats(answer: t.Mapping[str, t.Any]) -> list[str]:
    assert "error" not in answer, answer
    return [change["what"] for change in answer["changes"]]


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> t.Iterator[pathlib.Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "small", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@both
def test_a_branch_from_nothing(machine: Machine, server: str) -> None:
    before = machine.run("sh", "-c", "rpm -qa | sort; ls /etc/yum.repos.d /etc/modprobe.d /etc/dnf/modules.d").stdout
    planned = driver(machine, server, check=True, branch="570")
    assert planned["changed"]
    assert (
        machine.run("sh", "-c", "rpm -qa | sort; ls /etc/yum.repos.d /etc/modprobe.d /etc/dnf/modules.d").stdout
        == before
    )

    done = driver(machine, server, branch="570")
    assert whats(done) == whats(planned)
    assert ("module stream nvidia-driver" in whats(done)) == (machine.major == 9)
    assert done["result"]["user_space"] == done["result"]["on_disk"] == "570.195.03"
    assert done["result"]["flavour"] == "open"
    assert driver_versions(machine) == {"570.195.03"}
    assert "kmod-nvidia-open-dkms" in versions(machine)
    assert module_version(machine) == "570.195.03"
    assert machine.run("modinfo", "-k", KERNELS[machine.major], "-F", "license", "nvidia").stdout == "Dual MIT/GPL\n"
    assert len(locks(machine)) == len(versions(machine, "nvidia-(?!.*lock)"))
    assert "kmod-nvidia-open-dkms-3:570.195.03-1.el%d.*" % machine.major in locks(machine)
    if machine.major == 9:
        assert stream(machine) == "570-open"
        # dkms is not in NVIDIA's repository here.
        assert {"epel-release", "dkms"} <= set(versions(machine, "epel|dkms"))

    for check in (True, False):
        assert not driver(machine, server, check=check, branch="570")["changed"]


@both
def test_an_ordinary_upgrade_leaves_the_driver_alone(machine: Machine, server: str) -> None:
    driver(machine, server, version="570.124.06", branch="570")
    machine.run("dnf", "-q", "-y", "upgrade")
    assert driver_versions(machine) == {"570.124.06"}
    # The proof that the lock is what held it.
    machine.run("dnf", "-q", "-y", "versionlock", "clear")
    machine.run("dnf", "-q", "-y", "upgrade")
    assert driver_versions(machine) == ({"570.195.03"} if machine.major == 9 else {"590.44.01"})


@both
def test_locks_that_were_lost_are_seen_and_restored(machine: Machine, server: str) -> None:
    driver(machine, server, branch="580")
    kept = locks(machine)
    machine.run("dnf", "-q", "-y", "versionlock", "delete", "nvidia-driver-cuda")
    again = driver(machine, server, branch="580")
    assert whats(again) == ["package holds"]
    assert sorted(locks(machine)) == sorted(kept)


@both
def test_our_locks_are_released(machine: Machine, server: str) -> None:
    driver(machine, server, branch="580")
    assert locks(machine)
    released = driver(machine, server, branch="580", hold=False)
    assert whats(released) == ["package holds"]
    assert locks(machine) == []
    assert not driver(machine, server, branch="580", hold=False)["changed"]


@both
def test_other_locks_stay(machine: Machine, server: str) -> None:
    machine.run("dnf", "-q", "-y", "install", "python3-dnf-plugin-versionlock")
    machine.write(LOCKS, "kernel-devel-0:5.14.0-1.el9.*\n!bash-0:5.1.8-9.el9.*\n")
    driver(machine, server, branch="570")
    driver(machine, server, branch="580")
    assert {"kernel-devel-0:5.14.0-1.el9.*", "!bash-0:5.1.8-9.el9.*"} <= set(locks(machine))
    assert not [line for line in locks(machine) if ":570." in line]


@both
def test_branches_up_and_down(machine: Machine, server: str) -> None:
    for branch, version in (("570", "570.195.03"), ("580", "580.95.05"), ("570", "570.195.03")):
        done = driver(machine, server, branch=branch)
        assert done["changed"], done
        assert driver_versions(machine) == {version}
        assert module_version(machine) == version
        assert stream(machine) == (branch + "-open" if machine.major == 9 else "")
        assert not driver(machine, server, branch=branch)["changed"]


@both
def test_an_exact_version_up_and_down(machine: Machine, server: str) -> None:
    for version in ("580.65.06", "580.95.05", "580.65.06"):
        assert driver(machine, server, branch="580", version=version)["changed"]
        assert driver_versions(machine) == {version}
        assert module_version(machine) == version
    # Without a version, an installed driver of the branch is right.
    assert not driver(machine, server, branch="580")["changed"]


@both
def test_the_other_flavour(machine: Machine, server: str) -> None:
    driver(machine, server, branch="580")
    done = driver(machine, server, branch="580", flavour="proprietary")
    assert done["result"]["flavour"] == "proprietary"
    kinds = {name for name in versions(machine) if name.startswith("kmod")}
    assert kinds == {"kmod-nvidia-latest-dkms"}
    assert module_version(machine) == "580.95.05"
    assert machine.run("modinfo", "-k", KERNELS[machine.major], "-F", "license", "nvidia").stdout == "NVIDIA\n"
    assert stream(machine) == ("580-dkms" if machine.major == 9 else "")
    assert not [line for line in locks(machine) if "open" in line]


@both
def test_companions_change_their_names_with_the_branch(machine: Machine, server: str) -> None:
    options = {"fabric_manager": "present", "imex": "present"}
    driver(machine, server, branch="570", **options)
    old = {"nvidia-fabric-manager", "libnvidia-nscq-570", "nvidia-imex-570"}
    assert old <= set(versions(machine))
    done = driver(machine, server, branch="580", **options)
    assert "error" not in done, done
    assert not old & set(versions(machine))
    assert {"nvidia-fabricmanager", "libnvidia-nscq", "nvidia-imex"} <= set(versions(machine))
    assert driver_versions(machine) == {"580.95.05"}
    assert not driver(machine, server, branch="580", **options)["changed"]


@both
def test_a_branch_that_the_repository_does_not_have(machine: Machine, server: str) -> None:
    refused = driver(machine, server, branch="575")
    assert refused["error"] in ("stream_failed", "version_not_available")
    assert "575" in refused["message"], refused
    assert not driver_versions(machine)


@both
def test_a_version_that_the_repository_does_not_have(machine: Machine, server: str) -> None:
    refused = driver(machine, server, branch="580", version="580.105.08")
    assert refused["error"] == "version_not_available"
    assert "580.95.05" in refused["message"] and "580.105.08" in refused["message"], refused
    assert not driver_versions(machine)


@both
def test_a_repository_that_is_not_there(machine: Machine, server: str) -> None:
    refused = driver(machine, server, branch="580", repository_url=server + "/nowhere")
    assert refused["error"] == "repository_unreachable"
    assert server + "/nowhere/rhel%d/x86_64" % machine.major in refused["message"]
    # dnf refuses everything as long as a repository is unreachable: the definition is taken back.
    assert "cuda-rhel" not in machine.run("sh", "-c", "ls /etc/yum.repos.d").stdout
    machine.run("dnf", "-q", "makecache")


@el10
def test_packages_without_a_signature(machine: Machine, server: str) -> None:
    machine.run(
        "sh",
        "-c",
        "mkdir /srv/bad && cd /srv/bad && dnf -q download --repofrompath cuda,%s/compute/cuda/repos/rhel10/x86_64 --repo cuda "
        "nvidia-persistenced libnvidia-cfg && rpmsign --delsign *.rpm && createrepo_c -q ." % server,
    )
    machine.write(
        "/etc/yum.repos.d/bad.repo",
        "[bad]\nname=Bad\nbaseurl=file:///srv/bad\ngpgcheck=1\ngpgkey=%s/rocky/10/KEY\n" % server,
    )
    refused = machine.ask("manager", method="install", arguments=[{"nvidia-persistenced": None}])
    assert refused["error"] == "package_failed"
    assert "-590.44.01-1.el10.x86_64.rpm is not signed" in refused["message"], refused
    assert not driver_versions(machine)


@el9
def test_rhel_without_epel_is_told_what_to_enable(machine: Machine, server: str) -> None:
    text = machine.read("/etc/os-release")
    machine.write(
        "/etc/os-release", text.replace('ID="rocky"', 'ID="rhel"').replace('ID_LIKE="rhel centos fedora"', "")
    )
    refused = driver(machine, server, branch="580")
    assert refused["error"] == "dkms_unavailable"
    assert "codeready-builder-for-rhel-9-x86_64-rpms" in refused["message"]
    assert not driver_versions(machine)


@both
def test_headers_of_a_kernel_that_is_gone(machine: Machine, server: str) -> None:
    machine.kernel = "5.14.0-1.el9.x86_64"
    refused = driver(machine, server, branch="580")
    assert refused["error"] == "kernel_headers_unavailable"
    assert "5.14.0-1.el9.x86_64" in refused["message"]
    assert not driver_versions(machine)


@both
def test_the_toolkit(machine: Machine, server: str) -> None:
    answer = machine.ask("repository", name="nvidia_container_toolkit", url=server + "/libnvidia-container")
    assert len(answer["first"]) == 1 and answer["second"] == [], answer
    names = [
        "nvidia-container-toolkit",
        "nvidia-container-toolkit-base",
        "libnvidia-container-tools",
        "libnvidia-container1",
    ]
    offers = machine.ask("manager", method="available", arguments=names)["answer"]
    assert {name: [one["version"] for one in offers[name]] for name in offers} == {
        name: ["1.20.0-1", "1.17.8-1"] for name in names
    }
    for version in ("1.17.8-1", "1.20.0-1", "1.17.8-1"):
        assert machine.ask("manager", method="install", arguments=[dict.fromkeys(names, version)]) == {"answer": None}
        machine.ask("manager", method="hold", arguments=names)
        found = machine.ask("manager", method="installed", arguments=names)["answer"]
        assert {one["version"] for one in found.values()} == {version} and len(found) == 4
        assert all(one["held"] for one in found.values())
    machine.ask("manager", method="unhold", arguments=names[:1])
    found = machine.ask("manager", method="installed", arguments=names)["answer"]
    assert [name for name in names if not found[name]["held"]] == names[:1]


@both
def test_docker_engine(machine: Machine, server: str) -> None:
    answer = machine.ask("repository", name="docker", url=server + "/linux")
    assert len(answer["first"]) == 1 and answer["second"] == [], answer
    # With dnf's own variable for the architecture, as Docker's file has it.
    assert "/centos/%d/$basearch/stable" % machine.major in machine.read("/etc/yum.repos.d/docker-ce-stable.repo")
    newest = "3:28.5.1-1.el%d" % machine.major
    offers = machine.ask("manager", method="available", arguments=["docker-ce"])["answer"]["docker-ce"]
    assert offers[0]["version"] == newest
    assert machine.ask("manager", method="install", arguments=[{"docker-ce": newest, "docker-ce-cli": None}]) == {
        "answer": None
    }
    assert versions(machine, "docker-ce$") == {"docker-ce": newest}
    machine.ask("manager", method="remove", arguments=["docker-ce", "no-such-package"])
    # Only what was named goes.
    assert set(versions(machine, "docker|containerd")) == {"docker-ce-cli", "containerd.io"}


@both
def test_an_impossible_wish_names_the_missing_thing(machine: Machine, server: str) -> None:
    refused = machine.ask("manager", method="install", arguments=[{"no-such-package": None}])
    assert refused["error"] == "package_failed"
    assert "no-such-package" in refused["message"]


# -- before a host is taken out of service


def prestage(machine: Machine, server: str, **options: t.Any) -> dict[str, t.Any]:
    return machine.ask("prestage", options={"repository_url": server + "/compute/cuda/repos", **options})


def make_lists_old(machine: Machine) -> None:
    machine.run("find", "/var/cache/dnf", "-exec", "touch", "-d", "2020-01-01", "{}", "+")


@both
def test_what_lies_ready_is_all_that_the_change_takes(
    machine: Machine, server: str, faults: dict[str, int | None]
) -> None:
    options = {"fabric_manager": "present", "imex": "present"}
    driver(machine, server, branch="570", **options)
    machine.run("rpm", "-e", "--nodeps", "kernel-devel")
    before = versions(machine, ""), locks(machine), stream(machine)
    ready = prestage(machine, server, branch="580", **options)
    assert ready["version"] == "580.95.05", ready
    assert {verdict.partition(":")[0] for verdict in ready["verdicts"].values()} == {"ok"}, ready
    # Nothing but the cache is another.
    assert (versions(machine, ""), locks(machine), stream(machine)) == before
    assert machine.run("sh", "-c", "find /run/gpu_fleet -mindepth 1 || :").stdout == ""
    # No repository answers any more, and the lists are too old for dnf.
    make_lists_old(machine)
    faults["/"] = 503
    done = driver(machine, server, branch="580", **options)
    assert "error" not in done, done
    assert driver_versions(machine) == {"580.95.05"}
    assert stream(machine) == ("580-open" if machine.major == 9 else "")
    # Nor for the way back.
    back = driver(machine, server, branch="570", version="570.195.03", **options)
    assert "error" not in back, back
    assert driver_versions(machine) == {"570.195.03"}
    assert module_version(machine) == "570.195.03"


@both
def test_a_download_says_what_is_wrong_with_it(machine: Machine, server: str, faults: dict[str, int | None]) -> None:
    driver(machine, server, branch="570")
    faults["nvidia-driver-cuda-libs-580.95.05"] = None
    refused = prestage(machine, server, branch="580")
    assert refused["error"] == "package_damaged", refused
    assert "nvidia-driver-cuda-libs-580.95.05" in refused["message"] and "checksum" in refused["message"]
    faults["nvidia-driver-cuda-libs-580.95.05"] = 404
    refused = prestage(machine, server, branch="580")
    assert refused["error"] == "package_failed" and "404" in refused["message"], refused
    faults["/"] = 503
    refused = prestage(machine, server, branch="580")
    assert refused["error"] == "repository_unreachable", refused
    faults.clear()
    machine.free = 10**8
    refused = prestage(machine, server, branch="580")
    assert refused["error"] == "disk_full" and "the build" in refused["message"], refused
    assert driver_versions(machine) == {"570.195.03"}


@el10
def test_a_disk_that_is_too_small_for_the_download(machine: Machine, server: str, small_disk: pathlib.Path) -> None:
    driver(machine, server, branch="570")
    machine.binds[small_disk] = "/var/cache/dnf"
    machine.run("dnf", "-q", "makecache")
    machine.run(
        "sh",
        "-c",
        "head -c $(($(df --output=avail -B1 /var/cache/dnf | tail -1) - 16384)) /dev/zero >/var/cache/dnf/full",
    )
    refused = prestage(machine, server, branch="580")
    assert refused["error"] == "disk_full" and "Downloading" in refused["message"], refused


@both
def test_headers_of_the_kernel_after_a_reboot_lie_ready(machine: Machine, server: str) -> None:
    new = machine.kernel
    machine.kernel = new.partition("-")[0] + "-1.x86_64"
    machine.write("/lib/modules/%s/build/Makefile" % machine.kernel, "")
    machine.write("/boot/vmlinuz-" + new, "")
    for file in ("modules.order", "modules.builtin"):
        machine.write("/lib/modules/%s/%s" % (machine.kernel, file), "")
    driver(machine, server, branch="570")
    options = {"repository_url": server + "/compute/cuda/repos", "branch": "580"}
    for reboot in (False, True):
        ready = machine.ask("prestage", options=options, reboot=reboot)
        assert "error" not in ready, ready
        cached = machine.run("find", "/var/cache/dnf", "-name", "kernel-devel-%s.rpm" % new).stdout
        assert bool(cached) == reboot


@both
def test_what_nobody_offers_is_refused_beforehand(machine: Machine, server: str) -> None:
    driver(machine, server, branch="570")
    for options in ({"branch": "575"}, {"branch": "580", "version": "580.105.08"}):
        refused = prestage(machine, server, **options)
        assert refused["error"] == "version_not_available", refused
    assert stream(machine) == ("570-open" if machine.major == 9 else "")


@both
def test_a_way_back_that_cannot_be_had_any_more(machine: Machine, server: str, faults: dict[str, int | None]) -> None:
    driver(machine, server, branch="570")
    machine.run("dnf", "-q", "clean", "packages")
    faults["libnvidia-ml-570.195.03"] = 404
    ready = prestage(machine, server, branch="580")
    assert ready.get("verdicts", {}).get("way_back", "").startswith("warning: "), ready
    assert "libnvidia-ml-570.195.03" in ready["verdicts"]["way_back"]
