# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Package tools that print anything, sources that people wrote, versions of every form."""

from __future__ import annotations

import functools

from ansible_collections.gpu_fleet.nim.plugins.module_utils._apt import Apt
from ansible_collections.gpu_fleet.nim.plugins.module_utils._apt_sources import apt_components, debian_source
from ansible_collections.gpu_fleet.nim.plugins.module_utils._dnf import Dnf
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_branches import (
    branch_of_version,
    check_branch,
    check_version,
    choose_flavour,
    upstream_version,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_driver_packages import to_hold, user_space_version
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import parse_os_release
from ansible_collections.gpu_fleet.nim.plugins.module_utils._package_versions import (
    compare_debian,
    compare_rpm,
    matches_version,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._package_versions import upstream_version as upstream_part
from fake_host import FakeHost
from fuzzing import damaged, encodable, only_told, texts
from hypothesis import given
from hypothesis import strategies as st

DPKG = "nvidia-open-580\t580.95.05-0ubuntu1\tamd64\thi \nlibc6\t2.39-0ubuntu8\tamd64\tii \nold\t\tamd64\tun \n"
MADISON = (
    " docker-ce | 5:28.5.1-1~debian.13~trixie | https://download.docker.com/linux/debian trixie/stable amd64 Packages\n"
)
RPM = "kmod-nvidia\t3:580.95.05-1.el9\tx86_64\nglibc\t2.34-1.el9\tx86_64\n"
REPOQUERY = "docker-ce\t3:28.5.1-1.el9\tdocker-ce-stable\ndocker-ce\t0:27.1-1\tdocker\n"
SOURCES = """\
Types: deb
URIs: http://deb.debian.org/debian
Suites: trixie trixie-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
Enabled: no
URIs: https://example.org
Suites: trixie
"""
LIST = "deb [signed-by=/x.gpg arch=amd64] http://deb.debian.org/debian trixie main # comment\ndeb-src http://x trixie main\n"
OS = parse_os_release("ID=debian\nVERSION_ID=13\nVERSION_CODENAME=trixie\n")
_piece = st.sampled_from(("1", "0", "01", "10", "~", "+", "-", ".", ":", "a", "rc", "el9", "^", "580.95.05", "9" * 30))
versions = st.lists(_piece, max_size=7).map("".join) | texts


@given(damaged(DPKG, 4), damaged(MADISON * 2, 4), damaged(SOURCES, 4), damaged(LIST, 4))
def test_apt(dpkg: str, madison: str, sources: str, listed: str) -> None:
    host = FakeHost(
        {
            "/etc/apt/sources.list.d/debian.sources": encodable(sources),
            "/etc/apt/sources.list": encodable(listed),
        },
        {"dpkg-query *": dpkg, "apt-cache *": madison},
    )
    apt = Apt(host)
    with only_told():
        installed = apt.installed("*")
        for name, package in installed.items():
            assert package.name == name
            assert package.version
        apt.interrupted()
        for offers in apt.available("docker-ce").values():
            found = [offer.version for offer in offers]
            assert len(found) == len(set(found))
        user_space_version(installed)
        to_hold(installed)
        components = apt_components(host, OS)
        assert debian_source(host, OS, sorted(components)).endswith("\n")


@given(damaged(RPM, 4), damaged(REPOQUERY, 4), damaged('[[packages]]\nname = "nvidia*"\n', 3), texts)
def test_dnf(rpm: str, offered: str, locks: str, old_locks: str) -> None:
    host = FakeHost(
        {
            "/etc/dnf/versionlock.toml": encodable(locks),
            "/etc/dnf/plugins/versionlock.list": encodable(old_locks),
        },
        {"rpm *": rpm, "dnf *": offered, "dnf5 *": offered},
    )
    dnf = Dnf(host)
    with only_told():
        dnf.installed("*")
        dnf.available("docker-ce")
        dnf.module_stream("nvidia-driver")


@given(versions, versions, versions)
def test_versions_have_an_order(one: str, two: str, three: str) -> None:
    for compare in (compare_debian, compare_rpm):
        assert compare(one, one) == 0
        assert compare(one, two) == -compare(two, one)
    first, second, third = sorted((one, two, three), key=functools.cmp_to_key(compare_debian))
    assert compare_debian(first, second) <= 0
    assert compare_debian(first, third) <= 0
    assert compare_debian(second, third) <= 0


@given(versions, versions)
def test_versions_of_every_form(version: str, wanted: str) -> None:
    with only_told():
        assert isinstance(upstream_part(version), str)
        assert matches_version(version, version)
        assert matches_version(version, "")
        matches_version(version, wanted)
        assert isinstance(branch_of_version(version), str)
        assert isinstance(upstream_version(version), str)
    for check in (
        lambda: check_branch(version),
        lambda: check_version(version, "580"),
        lambda: check_version("580.1", wanted),
    ):
        with only_told():
            check()


@given(
    st.sampled_from(("auto", "open", "proprietary")),
    st.lists(texts | st.sampled_from(("Hopper", "Volta", "Blackwell"))),
)
def test_flavours(flavour: str, architectures: list[str]) -> None:
    with only_told():
        assert choose_flavour(flavour, "580", architectures) in ("open", "proprietary")
