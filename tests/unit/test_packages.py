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


@pytest.mark.parametrize(
    "url",
    [
        "https://ops:hunter2@mirror.example.org/x",
        "https://hunter2@mirror.example.org/x",
        "https://ops:p/hunter2@mirror.example.org/x",
        "https://ops:p/s/s?s#s/hunter2@mirror.example.org/x",
        "https://ops:?hunter2@mirror.example.org/x",
        "https://ops/hunter2@mirror.example.org/x",
        "https:/ops:hunter2@mirror.example.org/x",
        "ops:hunter2@mirror.example.org",
        "ftp://ops:hunter2@mirror.example.org/x",
        "https://[ops:hunter2@mirror.example.org/x",
        "https://ops:hunter2",
        "https://ops:hunter2/x",
        "https://mirror.example.org/x?token=hunter2",
        "https://mirror.example.org/nvapi-hunter2hunter2/x",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(FleetError, match="password") as caught:
        check_url("repository_url", url)
    assert "hunter2" not in caught.value.message
    assert caught.value.reason == "invalid_option"


@pytest.mark.parametrize(
    "url",
    [
        "https://mirror.example.org/a",
        "http://10.0.0.1:8081/repository/cuda%40x",
        "https://[fd00::1]:8443/a",
        "https://h",
        "https://nexus.example.org/repository/nvidia-keyring/key",
    ],
)
def test_url_loses_its_last_slash(url: str) -> None:
    assert check_url("x", " %s/ " % url) == url


def test_choice_of_the_tool(host: FakeHost) -> None:
    assert isinstance(package_manager(host, OsRelease("ubuntu")), Apt)
    assert isinstance(package_manager(host, OsRelease("rocky")), Dnf)
    with pytest.raises(FleetError, match="is not supported"):
        package_manager(host, OsRelease("arch"))
