# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The package plan of every supported distribution, branch, source and flavour, against what repositories offer.

The data of Debian's own repository are extracts of real indices. Those of NVIDIA (apt and RPM) and of Ubuntu are built after
their documents: a test against them shows that a plan fits what is documented. For the branches after 595 (610, 615, 620)
there are no data at all, so for them nothing but the form of the plan is tested.
"""

from __future__ import annotations

import json
import pathlib
import re

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_branches import branch_names, upstream_version
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver import NvidiaDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_packages import (
    Wish,
    foreign_packages,
    is_driver_package,
    later_headers,
    package_plan,
    repository_directory,
    to_hold,
    user_space_version,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import DRIVER_REPOSITORY
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import OsRelease
from ansible_collections.gpu_fleet.nim.plugins.module_utils._packages import Package, package_manager
from fake_host import FakeHost

SYSTEMS = {
    "ubuntu2204": OsRelease("ubuntu", "22.04", 22, "jammy", ("debian",), "Ubuntu 22.04"),
    "ubuntu2404": OsRelease("ubuntu", "24.04", 24, "noble", ("debian",), "Ubuntu 24.04"),
    "debian12": OsRelease("debian", "12", 12, "bookworm", (), "Debian GNU/Linux 12"),
    "debian13": OsRelease("debian", "13", 13, "trixie", (), "Debian GNU/Linux 13"),
    "rhel8": OsRelease("rhel", "8.10", 8, "", ("fedora",), "RHEL 8.10"),
    "rhel9": OsRelease("rocky", "9.4", 9, "", ("rhel", "centos", "fedora"), "Rocky Linux 9.4"),
    "rhel10": OsRelease("almalinux", "10.0", 10, "", ("rhel", "centos", "fedora"), "AlmaLinux 10.0"),
}
KERNELS = {"ubuntu": "6.8.0-45-generic", "debian": "6.1.0-28-amd64"}
BRANCHES = ("535", "550", "555", "560", "565", "570", "575", "580", "590", "595")
INSTALLABLE_BY_DISTRIBUTION = {
    "ubuntu2204": ("535", "550", "570", "580"),
    "ubuntu2404": ("535", "550", "570", "580"),
    "debian12": ("535",),
    "debian13": ("535", "550"),
}


def kernel_of(system: OsRelease) -> str:
    return KERNELS.get(system.id, "5.14.0-427.el9.x86_64")


def wish(**changes: object) -> Wish:
    values: dict[str, object] = {
        "source": "nvidia",
        "repository_url": DRIVER_REPOSITORY,
        "branch": "580",
        "version": "",
        "flavour": "open",
    }
    values.update(changes)
    return Wish(**values)  # type: ignore[arg-type]  # a table of keyword arguments


def repository(fixtures: pathlib.Path, name: str) -> FakeHost:
    """A host whose package tool offers what a file of ``fixtures/driver_repositories`` has."""
    offered = json.loads((fixtures / "driver_repositories" / (name + ".json")).read_text())["packages"]
    host = FakeHost()

    def madison(_host: FakeHost, argv: tuple[str, ...], _stdin: object, _env: object) -> str:
        return "".join(
            "%s | %s | https://repository.test Packages\n" % (package, version)
            for package in argv[2:]
            for version in offered.get(package, [])
        )

    def repoquery(_host: FakeHost, argv: tuple[str, ...], _stdin: object, _env: object) -> str:
        return "".join(
            "%s\t%s\tcuda\n" % (package, version if ":" in version else "0:" + version)
            for package in argv[8:]
            for version in offered.get(package, [])
        )

    host.commands["apt-cache madison *"] = madison
    host.commands["dnf -q -C repoquery *"] = repoquery
    host.commands["apt-get *"] = ""
    host.commands["dnf *"] = ""
    return host


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_imex_in_a_branch_that_has_none(name: str) -> None:
    with pytest.raises(FleetError, match="choose branch 550") as caught:
        package_plan(SYSTEMS[name], "x86_64", "k", wish(branch="535", imex=True))
    assert caught.value.reason == "invalid_option"


@pytest.mark.parametrize("flavour", ["open", "proprietary"])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_every_branch_from_nvidia(fixtures: pathlib.Path, name: str, branch: str, flavour: str) -> None:
    system = SYSTEMS[name]
    host = repository(fixtures, name + "-nvidia")
    manager = package_manager(host, system)
    asked = wish(branch=branch, flavour=flavour, fabric_manager=True, nvlink5=True, imex=int(branch) >= 550)
    plan = package_plan(system, "x86_64", kernel_of(system), asked)
    driver = NvidiaDriver(branch=branch, flavour=flavour)
    resolved = driver.resolve(manager, plan, {})
    # Everything that must have the driver's version has it exactly, in the branch.
    versions = {
        upstream_version(version)
        for package, version in resolved.items()
        if package not in ("nvlsm", "infiniband-diags", plan.pinning)
    }
    assert len(versions) == 1
    assert versions.pop().split(".")[0] == branch
    # One name of every choice, or the choice is one that the branch does not have.
    for choice in plan.choices:
        assert choice.optional or [package for package in choice.names if package in resolved]
    assert plan.repository is not None
    assert plan.repository.url == "%s/%s/x86_64" % (DRIVER_REPOSITORY, name)
    if system.family == "debian":
        assert plan.manager == "apt"
        assert plan.headers == "linux-headers-" + kernel_of(system)
        assert plan.repository.key_url.endswith("/3bf863cc.pub")
        if int(branch) >= 590:
            assert plan.pinning == "nvidia-driver-pinning-" + branch
            assert plan.preferences == ""
            assert not any(re.search(r"-\d{3}(-open)?$", package) for package in resolved if package != plan.pinning)
        else:
            assert plan.pinning == ""
            assert "Pin: version %s.*\n" % branch in plan.preferences
    else:
        assert plan.manager == "dnf"
        assert plan.headers == "kernel-devel-" + kernel_of(system)
        assert plan.repository.key_url.endswith("/D42D0685.pub")
        assert plan.prerequisites == ("dkms",)
        suffix = "open" if flavour == "open" else "dkms"
        assert plan.stream == ("" if name == "rhel10" else "%s-%s" % (branch, suffix))
        assert resolved["nvidia-driver-cuda"].startswith("3:%s." % branch)
        assert ("kmod-nvidia-open-dkms" in resolved) == (flavour == "open")
    # Nothing of the plan is foreign to the plan.
    installed = {package: Package(package, version) for package, version in resolved.items()}
    assert foreign_packages(plan, installed, branch) == []
    assert driver.differing(plan, installed) == []


@pytest.mark.parametrize("branch", [branch for branch in branch_names() if branch not in BRANCHES])
@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_branches_without_data_follow_the_newest_that_has_some(name: str, branch: str) -> None:
    """That is assumed: names have had one shape since 590. No repository, and no document of it, has confirmed these branches."""
    hardware = {"fabric_manager": True, "nvlink5": True, "imex": True}
    newest, later = (
        package_plan(SYSTEMS[name], "x86_64", "k", wish(branch=each, **hardware)) for each in (BRANCHES[-1], branch)
    )
    assert int(branch) > int(BRANCHES[-1])
    assert repr(later) == repr(newest).replace(BRANCHES[-1], branch)


@pytest.mark.parametrize("flavour", ["open", "proprietary"])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("name", sorted(INSTALLABLE_BY_DISTRIBUTION))
def test_every_branch_from_the_distribution(fixtures: pathlib.Path, name: str, branch: str, flavour: str) -> None:
    system = SYSTEMS[name]
    manager = package_manager(repository(fixtures, name + "-distribution"), system)
    driver = NvidiaDriver(source="distribution", branch=branch, flavour=flavour)
    offered = branch in INSTALLABLE_BY_DISTRIBUTION[name] and not (
        name == "debian13" and branch == "535" and flavour == "open"
    )
    asked = wish(source="distribution", branch=branch, flavour=flavour)
    try:
        plan = package_plan(system, "x86_64", kernel_of(system), asked)
        resolved = driver.resolve(manager, plan, {})
    except FleetError as error:
        assert not offered
        assert error.reason in ("invalid_option", "version_not_available")
        assert "nvidia_driver_" in error.message
        return
    assert offered
    assert plan.repository is None
    assert plan.components == (("contrib", "non-free", "non-free-firmware") if system.id == "debian" else ())
    versioned = {name for choice in plan.choices if choice.versioned for name in choice.names}
    assert {upstream_version(resolved[package]).split(".")[0] for package in resolved if package in versioned} == {
        branch
    }
    installed = {package: Package(package, version) for package, version in resolved.items()}
    assert foreign_packages(plan, installed, branch) == []
    assert driver.differing(plan, installed) == []


@pytest.mark.parametrize("name", ["ubuntu2204", "ubuntu2404"])
def test_signed_modules_of_ubuntu_under_secure_boot(fixtures: pathlib.Path, name: str) -> None:
    system = SYSTEMS[name]
    plan = package_plan(system, "x86_64", "6.8.0-45-generic", wish(source="distribution", signed_modules=True))
    resolved = NvidiaDriver(source="distribution").resolve(
        package_manager(repository(fixtures, name + "-distribution"), system), plan, {}
    )
    assert "linux-modules-nvidia-580-server-open-6.8.0-45-generic" in resolved
    assert "nvidia-headless-no-dkms-580-server-open" in resolved
    assert plan.headers == ""


def test_an_exact_version_and_its_pin(fixtures: pathlib.Path) -> None:
    system = SYSTEMS["ubuntu2404"]
    manager = package_manager(repository(fixtures, "ubuntu2404-nvidia"), system)
    plan = package_plan(system, "x86_64", "k", wish(version="580.65.06", fabric_manager=True))
    assert "Pin: version 580.65.06-*\n" in plan.preferences
    resolved = NvidiaDriver(version="580.65.06").resolve(manager, plan, {})
    assert resolved == {
        "nvidia-open-580": "580.65.06-0ubuntu1",
        "nvidia-fabricmanager": "580.65.06-1",
        "libnvidia-nscq": "580.65.06-1",
    }
    exact = package_plan(system, "x86_64", "k", wish(branch="595", version="595.45.04"))
    assert exact.pinning == "nvidia-driver-pinning-595.45.04"


def test_a_version_that_is_not_on_offer_names_those_that_are(fixtures: pathlib.Path) -> None:
    system = SYSTEMS["ubuntu2404"]
    manager = package_manager(repository(fixtures, "ubuntu2404-nvidia"), system)
    plan = package_plan(system, "x86_64", "k", wish(version="580.99.99"))
    with pytest.raises(FleetError) as caught:
        NvidiaDriver(version="580.99.99").resolve(manager, plan, {})
    assert caught.value.reason == "version_not_available"
    assert "580.95.05-0ubuntu1, 580.65.06-0ubuntu1" in caught.value.message


def test_companions_follow_the_installed_driver_not_the_newest(fixtures: pathlib.Path) -> None:
    system = SYSTEMS["ubuntu2404"]
    manager = package_manager(repository(fixtures, "ubuntu2404-nvidia"), system)
    plan = package_plan(system, "x86_64", "k", wish(fabric_manager=True))
    installed = {"nvidia-open-580": Package("nvidia-open-580", "580.65.06-0ubuntu1")}
    assert NvidiaDriver().resolve(manager, plan, installed)["nvidia-fabricmanager"] == "580.65.06-1"


def test_directories_and_mirrors() -> None:
    assert repository_directory(SYSTEMS["rhel9"], "x86_64") == "rhel9/x86_64"
    assert repository_directory(SYSTEMS["ubuntu2404"], "aarch64") == "ubuntu2404/sbsa"
    assert repository_directory(SYSTEMS["ubuntu2404"], "aarch64", "arm64") == "ubuntu2404/arm64"
    plan = package_plan(SYSTEMS["debian12"], "x86_64", "k", wish(repository_url="https://mirror.test/cuda"))
    assert plan.repository is not None
    assert plan.repository.url == "https://mirror.test/cuda/debian12/x86_64"
    for other in (OsRelease("ubuntu", "20.04", 20, "focal"), OsRelease("fedora", "44", 44), OsRelease("arch")):
        with pytest.raises(FleetError, match="supported are Ubuntu") as caught:
            repository_directory(other, "x86_64")
        assert caught.value.reason == "unsupported_os"


def test_sources_that_do_not_have_it() -> None:
    with pytest.raises(FleetError, match="has no NVIDIA driver packages of its own"):
        package_plan(SYSTEMS["rhel9"], "x86_64", "k", wish(source="distribution"))
    with pytest.raises(FleetError, match="itself has branch 535 only"):
        package_plan(SYSTEMS["debian12"], "x86_64", "k", wish(source="distribution", branch="580"))
    with pytest.raises(FleetError, match="with proprietary modules only"):
        package_plan(SYSTEMS["debian13"], "x86_64", "k", wish(source="distribution", branch="535"))
    with pytest.raises(FleetError, match="needs Fabric Manager or IMEX"):
        package_plan(SYSTEMS["debian12"], "x86_64", "k", wish(source="distribution", branch="535", fabric_manager=True))


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("nvidia-open-580", True),
        ("libnvidia-compute-580", True),
        ("cuda-drivers", True),
        ("libcuda1", True),
        ("nvidia-driver-pinning-580", True),
        ("kmod-nvidia-open-dkms", True),
        ("xserver-xorg-video-nvidia-580", True),
        ("nvidia-container-toolkit", False),
        ("libnvidia-container1", False),
        ("nvidia-cuda-toolkit", False),
        ("linux-modules-nvidia-580-server-6.8.0-45-generic", False),
        ("dkms", False),
        ("linux-headers-amd64", False),
        ("linux-image-amd64", False),
    ],
)
def test_what_belongs_to_the_driver(name: str, belongs: bool) -> None:
    assert is_driver_package(name) is belongs


def packages(*items: str) -> dict[str, Package]:
    return {item.split("=")[0]: Package(item.split("=")[0], item.split("=")[1]) for item in items}


@pytest.mark.parametrize(
    ("system", "kernel", "installed", "missing"),
    [
        ("debian12", "6.1.0-18-amd64", ("linux-image-amd64=6.1.76-1",), ["linux-headers-amd64"]),
        ("debian12", "6.1.0-18-amd64", ("linux-image-amd64=6.1.76-1", "linux-headers-amd64=6.1.76-1"), []),
        ("debian12", "6.1.0-18-cloud-amd64", ("linux-image-cloud-amd64=6.1.76-1",), ["linux-headers-cloud-amd64"]),
        ("debian12", "6.1.0-18-rt-amd64", ("linux-image-rt-amd64=6.1.76-1",), ["linux-headers-rt-amd64"]),
        ("debian12", "6.1.0-18-arm64", ("linux-image-arm64=6.1.76-1",), ["linux-headers-arm64"]),
        ("debian12", "6.10.11+bpo-amd64", ("linux-image-amd64=6.10.11-1~bpo12+1",), ["linux-headers-amd64"]),
        ("debian12", "6.1.0-0.deb11.5-amd64", ("linux-image-amd64=6.1.76-1",), ["linux-headers-amd64"]),
        ("debian13", "6.12.43+deb13-cloud-amd64", ("linux-image-cloud-amd64=6.12.43-1",), ["linux-headers-cloud-amd64"]),
        # Of another flavour than the one that runs; the kernel itself; none of a distribution; a container.
        ("debian12", "6.1.0-18-cloud-amd64", ("linux-image-amd64=6.1.76-1",), []),
        ("debian12", "6.1.0-18-amd64", ("linux-image-6.1.0-18-amd64=6.1.76-1", "linux-image-amd64-dbg=6.1.76-1"), []),
        ("debian12", "6.8.12-own", ("linux-image-6.8.12-own=1",), []),
        ("debian12", "6.1.0-18-amd64", (), []),
        ("ubuntu2404", "6.8.0-45-generic", ("linux-image-generic=6.8.0-45.45",), ["linux-headers-generic"]),
        ("ubuntu2404", "6.8.0-45-generic", ("linux-image-virtual=6.8.0-45.45",), ["linux-headers-virtual"]),
        ("ubuntu2204", "6.8.0-45-generic", ("linux-image-generic-hwe-22.04=6.8.0-45.45~22.04.1",), ["linux-headers-generic-hwe-22.04"]),
        ("ubuntu2404", "6.8.0-1013-nvidia-64k", ("linux-image-nvidia-64k=6.8.0-1013.14",), ["linux-headers-nvidia-64k"]),
        ("ubuntu2404", "6.8.0-45-generic", ("linux-image-generic=6.8.0-45.45", "linux-headers-generic=6.8.0-45.45"), []),
        ("ubuntu2404", "6.8.0-45-generic", ("linux-image-6.8.0-45-generic=6.8.0-45.45", "linux-image-aws=6.8.0-1029.31"), []),
        ("rhel9", "5.14.0-427.el9.x86_64", ("kernel-devel=5.14.0-427.el9",), []),
    ],
)  # fmt: skip
def test_headers_of_the_kernels_that_upgrades_bring(
    system: str, kernel: str, installed: tuple[str, ...], missing: list[str]
) -> None:
    assert later_headers(package_plan(SYSTEMS[system], "x86_64", kernel, wish()), packages(*installed)) == missing
    without = package_plan(SYSTEMS[system], "x86_64", kernel, wish(kernel_headers=False))
    assert later_headers(without, packages(*installed)) == []


@pytest.mark.parametrize(
    ("system", "changes", "installed", "foreign"),
    [
        ("ubuntu2404", {}, ("nvidia-driver-535=535.1.2-0ubuntu1", "libnvidia-gl-535=535.1.2-0ubuntu1"), ["libnvidia-gl-535", "nvidia-driver-535"]),
        ("ubuntu2404", {}, ("nvidia-headless-580-server=580.1.2-0",), ["nvidia-headless-580-server"]),
        ("ubuntu2404", {}, ("cuda-drivers-580=580.1.2-0", "nvidia-dkms-580=580.1.2-0"), ["cuda-drivers-580", "nvidia-dkms-580"]),
        ("ubuntu2404", {"flavour": "proprietary"},
         ("nvidia-open-580=580.1.2-0", "nvidia-dkms-580-open=580.1.2-0"), ["nvidia-dkms-580-open", "nvidia-open-580"]),
        ("ubuntu2404", {}, ("nvidia-driver-open=595.1.2-1", "nvidia-driver-pinning-595=595-1"), ["nvidia-driver-open", "nvidia-driver-pinning-595"]),
        ("ubuntu2404", {"branch": "595"},
         ("nvidia-driver-pinning-590=590-1", "nvidia-open-580=580.1.2-0"), ["nvidia-driver-pinning-590", "nvidia-open-580"]),
        ("ubuntu2404", {"branch": "595"}, ("nvidia-driver-open=590.1.2-1",), []),
        ("ubuntu2404", {}, ("nvidia-container-toolkit=1.20.0-1", "nvidia-settings=510.47-0", "nvidia-modprobe=595.1.2-1"), []),
        ("ubuntu2404", {"branch": "575", "fabric_manager": True}, ("nvidia-fabricmanager=580.95.05-1",), ["nvidia-fabricmanager"]),
        ("debian12", {}, ("nvidia-kernel-dkms=535.1.2-1", "libcuda1=535.1.2-1"), ["nvidia-kernel-dkms"]),
        ("debian13", {},
         ("nvidia-tesla-535-driver-bin=535.1.2-1", "libnvidia-tesla-535-cuda1=535.1.2-1"), ["libnvidia-tesla-535-cuda1", "nvidia-tesla-535-driver-bin"]),
        ("debian12", {"source": "distribution", "branch": "535", "flavour": "proprietary"},
         ("nvidia-open-kernel-dkms=535.1.2-1", "cuda-drivers-580=580.1.2-1"), ["cuda-drivers-580", "nvidia-open-kernel-dkms"]),
        ("rhel9", {}, ("kmod-nvidia-latest-dkms=3:580.1.2-1.el9", "nvidia-driver-cuda=3:535.1.2-1.el9"), ["kmod-nvidia-latest-dkms"]),
        ("rhel9", {}, ("libnvidia-nscq-535=535.1.2-1", "nvidia-fabric-manager=535.1.2-1"), ["libnvidia-nscq-535", "nvidia-fabric-manager"]),
        ("rhel9", {"branch": "570"}, ("libnvidia-nscq=580.1.2-1", "nvidia-imex=580.1.2-1"), ["libnvidia-nscq", "nvidia-imex"]),
        ("rhel9", {}, ("libnvidia-nscq=580.1.2-1", "nvidia-imex=580.1.2-1"), []),
    ],
)  # fmt: skip
def test_what_stands_in_the_way(
    system: str, changes: dict[str, object], installed: tuple[str, ...], foreign: list[str]
) -> None:
    asked = wish(**changes)
    plan = package_plan(SYSTEMS[system], "x86_64", "k", asked)
    assert foreign_packages(plan, packages(*installed), asked.branch) == foreign


def test_holds_and_user_space() -> None:
    installed = packages(
        "libnvidia-compute-580=580.95.05-0ubuntu1",
        "nvidia-utils-580=580.65.06-0ubuntu1",
        "nvidia-driver-pinning-595=595-1",
        "nvidia-container-toolkit=1.20.0-1",
        "nvidia-kernel-common=20220217+3~deb12u1",
        "dkms=3.0.10-8",
    )
    assert to_hold(installed) == ["libnvidia-compute-580", "nvidia-driver-pinning-595", "nvidia-utils-580"]
    assert user_space_version(installed) == "580.95.05"
    assert user_space_version({}) == ""
    assert user_space_version(packages("nvidia-driver-cuda-libs=3:580.95.05-1.el9")) == "580.95.05"
    broken = {"libcuda1": Package("libcuda1", "535.261.03-1", complete=False)}
    assert user_space_version(broken) == ""
    assert to_hold(broken) == []


def test_the_distributions_own_tools_are_no_part_of_the_driver() -> None:
    # Ubuntu 24.04 with a driver that no package brought.
    assert to_hold(packages("libxnvctrl0=510.47.03-0ubuntu4.24.04.1")) == []
    driver = ("libnvidia-compute-580=580.95.05-0ubuntu1", "nvidia-utils-580=580.95.05-0ubuntu1")
    beside = packages(*driver, "libxnvctrl0=510.47.03-0ubuntu4.24.04.1", "nvidia-settings=580.95.05-0ubuntu1")
    assert to_hold(beside) == ["libnvidia-compute-580", "nvidia-settings", "nvidia-utils-580"]


@pytest.mark.parametrize("system", ["rhel8", "rhel9", "rhel10"])
def test_el_has_no_driver_without_a_module_package(system: str) -> None:
    with pytest.raises(FleetError, match=r"nvidia_driver_kernel_module = false: .* depend on a kernel module package"):
        package_plan(SYSTEMS[system], "x86_64", "k", wish(kernel_module=False, kernel_headers=False))


def test_without_the_kernel_module_its_packages_are_left_out() -> None:
    plan = package_plan(
        SYSTEMS["debian13"], "x86_64", "k",
        wish(source="distribution", branch="550", kernel_module=False, kernel_headers=False),
    )  # fmt: skip
    assert "nvidia-open-kernel-dkms" not in {name for choice in plan.choices for name in choice.names}
    assert plan.headers == ""


@pytest.mark.parametrize("flavour", ["open", "proprietary"])
@pytest.mark.parametrize("branch", ["550", "580", "595"])
@pytest.mark.parametrize("name", ["debian12", "debian13", "ubuntu2204", "ubuntu2404"])
def test_user_space_alone_from_nvidia(fixtures: pathlib.Path, name: str, branch: str, flavour: str) -> None:
    asked = wish(branch=branch, flavour=flavour, kernel_module=False, kernel_headers=False, persistenced=False)
    plan = package_plan(SYSTEMS[name], "x86_64", "k", asked)
    manager = package_manager(repository(fixtures, name + "-nvidia"), SYSTEMS[name])
    resolved = NvidiaDriver(branch=branch, flavour=flavour, kernel_module=False).resolve(manager, plan, {})
    assert not [
        package for package in resolved if re.search(r"dkms(?<!no-dkms)$|nvidia-(open|driver)(-\d+)?$", package)
    ]
    assert resolved
    # A module from elsewhere may be one of NVIDIA's packages, of either flavour: it is not removed.
    suffix = "" if branch == "595" else "-" + branch
    modules = [("nvidia-kernel-%sdkms" if SYSTEMS[name].id == "debian" else "nvidia-dkms" + suffix + "%s") % one for one in (
        ("", "open-") if SYSTEMS[name].id == "debian" else ("", "-open"))]  # fmt: skip
    assert foreign_packages(plan, packages(*["%s=%s.1.2-1" % (one, branch) for one in modules]), branch) == []


@pytest.mark.parametrize("flavour", ["open", "proprietary"])
def test_user_space_alone_from_ubuntu(fixtures: pathlib.Path, flavour: str) -> None:
    asked = wish(source="distribution", flavour=flavour, kernel_module=False, persistenced=False, signed_modules=True)
    plan = package_plan(SYSTEMS["ubuntu2404"], "x86_64", "k", asked)
    manager = package_manager(repository(fixtures, "ubuntu2404-distribution"), SYSTEMS["ubuntu2404"])
    driver = NvidiaDriver(source="distribution", flavour=flavour, kernel_module=False)
    assert sorted(driver.resolve(manager, plan, {})) == [
        "nvidia-headless-no-dkms-580-server" + ("-open" if flavour == "open" else ""),
        "nvidia-utils-580-server",
    ]
