# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""URLs of repositories, and which package tool a host has."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._apt import Apt
from ansible_collections.gpu_fleet.nim.plugins.module_utils._dnf import Dnf
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import OsRelease
from ansible_collections.gpu_fleet.nim.plugins.module_utils._packages import check_url, package_manager
from fake_host import FakeHost


@pytest.mark.parametrize(
    "url", ["mirror.example.org/x", "", "ftp://x/y", "https://", "https://a b/c", "file:///x", "https://[::1/x"]
)
def test_what_is_no_repository_url(url: str) -> None:
    with pytest.raises(FleetError, match="repository_url = "):
        check_url("repository_url", url)


def test_credentials_in_a_url_are_refused_and_not_shown() -> None:
    with pytest.raises(FleetError, match="user name or password") as caught:
        check_url("repository_url", "https://ops:hunter2@mirror.example.org/x")
    assert "hunter2" not in caught.value.message


def test_url_loses_its_last_slash() -> None:
    assert check_url("x", " https://mirror.example.org/a/ ") == "https://mirror.example.org/a"


def test_choice_of_the_tool(host: FakeHost) -> None:
    assert isinstance(package_manager(host, OsRelease("ubuntu")), Apt)
    assert isinstance(package_manager(host, OsRelease("rocky")), Dnf)
    with pytest.raises(FleetError, match="is not supported"):
        package_manager(host, OsRelease("arch"))
