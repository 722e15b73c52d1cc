# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""os-release(5) of the supported systems."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import parse_os_release, read_os_release
from fake_host import FakeHost


@pytest.mark.parametrize(
    ("text", "family", "directory", "codename"),
    [
        ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\nVERSION_CODENAME=noble\n', "debian", "ubuntu2404", "noble"),
        ('ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n', "debian", "debian12", "bookworm"),
        ('ID="rhel"\nID_LIKE="fedora"\nVERSION_ID="9.4"\n', "rhel", "rhel9", ""),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.4"\n', "rhel", "rhel9", ""),
        ('ID="almalinux"\nID_LIKE="rhel centos fedora"\nVERSION_ID="10.0"\n', "rhel", "rhel10", ""),
        ("ID=fedora\nVERSION_ID=44\n", "rhel", "fedora44", ""),
        ('ID="amzn"\nID_LIKE="fedora"\nVERSION_ID="2023"\n', "rhel", "amzn2023", ""),
        ('ID="sles"\nID_LIKE="suse"\nVERSION_ID="15.6"\n', "suse", "sles15", ""),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"\nVERSION_ID="15.6"\n', "suse", "opensuse15", ""),
        (
            "ID=linuxmint\nID_LIKE='ubuntu debian'\nVERSION_ID=22\nUBUNTU_CODENAME=noble\n",
            "debian",
            "linuxmint22",
            "noble",
        ),
        ("ID=arch\n", "arch", "arch0", ""),
    ],
)
def test_systems(text: str, family: str, directory: str, codename: str) -> None:
    release = parse_os_release(text)
    assert (release.family, release.repository_distribution, release.codename) == (family, directory, codename)


def test_odd_lines_are_skipped() -> None:
    release = parse_os_release('# comment\n\nID=debian\nBROKEN=\'x\nno equals sign\nPRETTY_NAME="Debian GNU/Linux"\n')
    assert (release.id, release.pretty) == ("debian", "Debian GNU/Linux")


def test_second_place_and_none(host: FakeHost) -> None:
    with pytest.raises(FleetError) as caught:
        read_os_release(host)
    assert caught.value.reason == "unsupported_os"
    host.files["/usr/lib/os-release"] = b"ID=debian\n"
    assert read_os_release(host).id == "debian"
