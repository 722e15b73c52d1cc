# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a power cut leaves of packages is put right, and what others lock is waited for: the real dpkg and apt in a directory."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pathlib
import subprocess
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._apt import Apt
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host

CONTROL = "Package: %s\nVersion: %s\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
CONFIGURATION = """\
Dir::State "{0}/state"; Dir::State::status "{0}/root/var/lib/dpkg/status";
Dir::Cache "{0}/cache"; Dir::Etc "{0}/etc"; Dir::Log "{0}/log";
APT::Sandbox::User "root"; Dpkg::Use-Pty "0";
DPkg::Options {{ "--root={0}/root"; }};
"""


class Machine:
    """A package database, and a repository that offers a library and what depends on it in three versions each."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        for name in (
            "state/lists/partial",
            "cache/archives/partial",
            "etc/sources.list.d",
            "etc/apt.conf.d",
            "log",
            "pool",
        ):
            (root / name).mkdir(parents=True)
        for name in ("etc/preferences.d", "etc/trusted.gpg.d", "root/var/lib/dpkg/info", "root/var/lib/dpkg/updates"):
            (root / name).mkdir(parents=True)
        (root / "root/var/lib/dpkg/status").touch()
        (root / "apt.conf").write_text(CONFIGURATION.format(root))
        (root / "etc/sources.list").write_text("deb [trusted=yes] file:%s/pool ./\n" % root)
        index = ""
        for version in ("1.0", "2.0", "3.0"):
            for name, depends in (("library", ""), ("program", "Depends: library (>= %s)\n" % version)):
                control = CONTROL % (name, version) + depends
                package = self.build(control, "pool/%s_%s_all.deb" % (name, version)).read_bytes()
                index += "%sFilename: ./%s_%s_all.deb\nSize: %d\n" % (control, name, version, len(package))
                index += "SHA256: %s\n\n" % hashlib.sha256(package).hexdigest()
        (root / "pool/Packages").write_text(index)

    def build(self, control: str, path: str, *, cut_off: bool = False) -> pathlib.Path:
        tree = self.root / ("tree-%s" % os.path.basename(path))
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(control)
        if cut_off:
            # As if the power went: dpkg is killed before it unpacks a file.
            (tree / "DEBIAN/preinst").write_text("#!/bin/sh\nkill -9 $PPID\n")
            (tree / "DEBIAN/preinst").chmod(0o755)
        subprocess.run(["dpkg-deb", "--build", str(tree), str(self.root / path)], check=True, capture_output=True)
        return self.root / path

    def dpkg(self, verb: str, *packages: str) -> int:
        paths = [str(self.root / package) for package in packages]
        return subprocess.run(["dpkg", verb, *paths], check=False, capture_output=True).returncode

    def cut_off(self, version: str) -> None:
        """The program is unpacked, and the library is being unpacked."""
        assert self.dpkg("--unpack", "pool/program_%s_all.deb" % version) == 0
        self.build(CONTROL % ("library", version), "killer.deb", cut_off=True)
        assert self.dpkg("--unpack", "killer.deb") == -9

    def packages(self) -> dict[str, str]:
        return {name: package.version for name, package in Apt(Host()).installed().items() if package.complete}


@pytest.fixture
def machine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setenv("DPKG_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("DPKG_ADMINDIR", str(tmp_path / "root/var/lib/dpkg"))
    monkeypatch.setenv("DPKG_FORCE", "script-chrootless,not-root")
    made = Machine(tmp_path)
    done = subprocess.run(["apt-get", "-q", "update"], check=False, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("before", ["", "1.0"], ids=["installation", "upgrade"])
def test_what_was_cut_off_gets_the_version_that_was_being_unpacked(machine: Machine, before: t.Any) -> None:
    if before:
        assert machine.dpkg("--install", "pool/library_1.0_all.deb", "pool/program_1.0_all.deb") == 0
    machine.cut_off("2.0")
    apt = Apt(Host())
    assert sorted(apt.interrupted()) == ["library", "program"]
    assert machine.packages() == {}
    apt.repair()
    assert apt.interrupted() == []
    assert machine.packages() == {"library": "2.0", "program": "2.0"}


def test_a_version_that_is_not_offered_any_more(machine: Machine) -> None:
    machine.cut_off("2.0")
    index = (machine.root / "pool/Packages").read_text()
    (machine.root / "pool/Packages").write_text(index.replace("Version: 2.0", "Version: 2.5"))
    subprocess.run(["apt-get", "-q", "update"], check=True, capture_output=True)
    Apt(Host()).repair()
    assert machine.packages() == {"library": "3.0", "program": "2.0"}


@pytest.mark.parametrize(
    ("lock", "act"),
    [
        ("state/lists/lock", lambda apt: apt.refresh()),
        ("cache/archives/lock", lambda apt: apt.install({"library": None})),
        ("root/var/lib/dpkg/lock-frontend", lambda apt: apt.hold("library")),
        ("root/var/lib/dpkg/lock", lambda apt: apt.hold("library")),
    ],
)
def test_another_tool_at_work(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, lock: str, act: t.Callable[[Apt], None]
) -> None:
    assert machine.dpkg("--install", "pool/library_1.0_all.deb") == 0
    slept = []
    with (machine.root / lock).open("a") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)

        def sleep(_host: Host, seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 2:
                held.close()

        monkeypatch.setattr(Host, "sleep", sleep)
        act(Apt(Host()))
    assert slept == [2, 2]
