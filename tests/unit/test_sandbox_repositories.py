# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The package repositories of the sandbox: complete, resolvable and the same every time."""

from __future__ import annotations

import hashlib
import importlib
import io
import re
import sys
import tarfile
from pathlib import Path

import pytest

SANDBOX = Path(__file__).resolve().parents[1] / "sandbox"
DISTRIBUTIONS = ("ubuntu2404", "debian13", "debian12")
#: What the driver packages need from the distribution.
OUTSIDE = {"dkms"}


@pytest.fixture(scope="module")
def modules():
    """The builder's modules by name; they are programs beside the collection, not a package."""
    paths = [str(SANDBOX / "repositories"), str(SANDBOX / "hardware/files")]
    before = set(sys.modules)
    sys.path[:0] = paths
    try:
        yield {name: importlib.import_module(name) for name in ("deb", "driver", "toolkit", "hardware")}
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in {"deb", "driver", "toolkit", "hardware"} - before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def driver_packages(modules):
    """{distribution: packages}, with empty programs in place of compiled ones."""
    driver = modules["driver"]
    programs = {
        f"{name}/{version}": version.encode()
        for _cuda, versions in driver.BRANCHES.values()
        for version in versions
        for name in ("nvidia-smi", "nvdaemon", "libcuda.so.1", "libnvidia-ml.so.1")
    }
    return {name: driver.packages(name, programs, b"key") for name in DISTRIBUTIONS}


def members(deb: bytes) -> dict[str, bytes]:
    """The members of the ar archive that a .deb is."""
    assert deb.startswith(b"!<arch>\n")
    found, at = {}, 8
    while at < len(deb):
        header = deb[at : at + 60]
        size = int(header[48:58])
        found[header[:16].decode().strip()] = deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    return found


def relations(text: str) -> list[list[tuple[str, str, str]]]:
    """[[(name, operator, version), alternative...], ...] of a Depends field."""
    found = []
    for group in filter(None, (part.strip() for part in text.split(","))):
        alternatives = []
        for one in group.split("|"):
            match = re.fullmatch(r"\s*(\S+)(?:\s*\((\S+) (\S+)\))?\s*", one)
            assert match, one
            alternatives.append((match.group(1), match.group(2) or "", match.group(3) or ""))
        found.append(alternatives)
    return found


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_dependency_of_the_driver_is_there(driver_packages, distribution):
    packages = driver_packages[distribution]
    there = {(package.name, package.version) for package in packages}
    names = {package.name for package in packages} | OUTSIDE
    for package in packages:
        for alternatives in relations(package.fields.get("Depends", "")):
            for name, operator, version in alternatives:
                assert name in names, f"{package.name} {package.version} needs {name}"
                if operator == "=":
                    assert (name, version) in there, f"{package.name} {package.version} needs {name} {version}"


@pytest.mark.parametrize("branch", ["535", "550", "555", "570", "575", "580"])
@pytest.mark.parametrize("stem", ["cuda-drivers", "nvidia-driver", "nvidia-dkms", "libnvidia-compute", "nvidia-utils"])
def test_branches_up_to_580_carry_the_branch_in_the_name_on_ubuntu(driver_packages, branch, stem):
    versions = [package.version for package in driver_packages["ubuntu2404"] if package.name == f"{stem}-{branch}"]
    assert versions
    assert all(re.match(rf"{branch}\.[\d.]+-0ubuntu1$", version) for version in versions)


@pytest.mark.parametrize("branch", ["590", "595"])
def test_branches_from_590_on_have_a_pinning_package_and_no_branch_in_their_names(driver_packages, branch):
    names = {package.name for package in driver_packages["ubuntu2404"] if package.version.startswith(branch + ".")}
    assert {
        "cuda-drivers",
        "nvidia-open",
        "nvidia-fabricmanager",
        "libnvidia-nscq",
        "nvidia-imex",
        "nvidia-persistenced",
    } <= names
    assert not [name for name in names if re.search(r"-\d{3}(-open)?$", name)]
    pinning = {
        package.name for package in driver_packages["ubuntu2404"] if package.name.startswith("nvidia-driver-pinning-")
    }
    assert f"nvidia-driver-pinning-{branch}" in pinning
    assert any(name.startswith(f"nvidia-driver-pinning-{branch}.") for name in pinning)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_open_metapackage_begins_with_560(driver_packages, distribution):
    found = {
        package.name for package in driver_packages[distribution] if re.match(r"nvidia-open(-\d+)?$", package.name)
    }
    assert found == {"nvidia-open", "nvidia-open-570", "nvidia-open-575", "nvidia-open-580"}
    versions = [package.version for package in driver_packages[distribution] if package.name == "nvidia-open"]
    assert min(versions).startswith("570.")


def test_companions_lose_the_branch_at_580(driver_packages):
    found = {(package.name, package.version) for package in driver_packages["ubuntu2404"]}
    assert ("nvidia-fabricmanager-575", "575.57.08-1") in found
    assert ("nvidia-fabricmanager", "580.95.05-1") in found
    assert not [name for name, _version in found if name == "nvidia-fabricmanager-580"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_only_one_branch_owns_a_path(driver_packages, distribution):
    """Packages that bring the same file either are one package in several versions or exclude each other."""
    owners: dict[str, list] = {}
    for package in driver_packages[distribution]:
        for path in [*package.files, *package.links]:
            owners.setdefault(path, []).append(package)
    for path, packages in owners.items():
        shared = [set(package.fields.get("Conflicts", "").split(", ")) - {""} for package in packages]
        names = {package.name for package in packages}
        assert len(names) == 1 or set.intersection(*shared), f"{path}: {names}"


def test_a_package_is_the_same_every_time(modules, driver_packages):
    package = next(one for one in driver_packages["ubuntu2404"] if one.name == "nvidia-utils-580")
    first = package.build()
    assert first == package.build()
    found = members(first)
    assert list(found) == ["debian-binary", "control.tar.gz", "data.tar.gz"]
    with tarfile.open(fileobj=io.BytesIO(found["data.tar.gz"])) as data:
        assert data.getmember("./usr/bin/nvidia-smi").mode == 0o755
        assert {member.mtime for member in data} == {modules["deb"].EPOCH}


def test_an_index_describes_its_packages(modules, tmp_path):
    packages = modules["toolkit"].packages()
    modules["deb"].flat_repository(tmp_path, packages, None, {"Origin": "test"})
    index = (tmp_path / "Packages").read_bytes()
    entries = [dict(line.split(": ", 1) for line in entry.splitlines()) for entry in index.decode().split("\n\n")]
    assert len(entries) == len(packages)
    for entry in entries:
        content = (tmp_path / entry["Filename"]).read_bytes()
        assert entry["SHA256"] == hashlib.sha256(content).hexdigest()
        assert entry["Size"] == str(len(content))
    assert hashlib.sha256(index).hexdigest() in (tmp_path / "Release").read_text()


def test_stale_packages_leave_the_repository(modules, tmp_path):
    (tmp_path / "old_1.0_amd64.deb").write_bytes(b"")
    modules["deb"].flat_repository(tmp_path, modules["toolkit"].packages(), None, {})
    assert not (tmp_path / "old_1.0_amd64.deb").exists()


def test_the_toolkit_is_four_packages_of_one_version(modules):
    by_version: dict[str, dict] = {}
    for package in modules["toolkit"].packages():
        by_version.setdefault(package.version, {})[package.name] = package
    assert set(by_version) == {"1.17.8-1", "1.20.0-1"}
    for version, found in by_version.items():
        assert set(found) == {
            "nvidia-container-toolkit",
            "nvidia-container-toolkit-base",
            "libnvidia-container-tools",
            "libnvidia-container1",
        }
        top = {
            name: (operator, wanted)
            for [(name, operator, wanted)] in relations(found["nvidia-container-toolkit"].fields["Depends"])
        }
        assert top == dict.fromkeys(set(found) - {"nvidia-container-toolkit"}, ("=", version))
    assert not [path for path in by_version["1.17.8-1"]["nvidia-container-toolkit-base"].files if "cdi-refresh" in path]


def test_a_stand_in_module_carries_what_modinfo_reads(modules, tmp_path):
    hardware = modules["hardware"]
    path = tmp_path / "nvidia.ko"
    path.write_bytes(hardware.module_file(hardware.module_values("nvidia", "580.95.05", "NVIDIA", "6.1.0-1-amd64")))
    found = hardware.modinfo(str(path))
    assert found["version"] == "580.95.05"
    assert found["name"] == "nvidia"
    assert found["vermagic"].startswith("6.1.0-1-amd64 ")
    assert path.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("gpu", "capability"),
    [
        ({"architecture": "Hopper", "brand": "NVIDIA", "name": "NVIDIA H200"}, "9.0"),
        ({"architecture": "Ampere", "brand": "NVIDIA", "name": "NVIDIA A100-SXM4-80GB"}, "8.0"),
        ({"architecture": "Ampere", "brand": "NVIDIA", "name": "NVIDIA A10"}, "8.6"),
        ({"architecture": "Blackwell", "brand": "GeForce", "name": "NVIDIA GeForce RTX 5090"}, "12.0"),
    ],
)
def test_compute_capability(modules, gpu, capability):
    assert modules["hardware"].compute_capability(gpu) == capability
