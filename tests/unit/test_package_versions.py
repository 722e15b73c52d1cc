# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Order of package versions, as dpkg and rpm see it."""

from __future__ import annotations

import subprocess

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._package_versions import (
    compare_debian,
    compare_rpm,
    matches_version,
)

VERSIONS = [
    "1.0~rc1", "1.0", "1.0-1", "1.0-1+b1", "1.0a", "1.17.4-1", "1.20.0-1", "20.10.24+dfsg1-1+deb12u1+b6", "26.1.5+dfsg1-9",
    "580.95.05-0ubuntu1", "580.159.04-1", "1:0.5", "5:28.3.3-1~debian.12~bookworm", "5:28.3.3-1~debian.13~trixie", "5:29.5.1-1",
]  # fmt: skip


def test_debian_order_is_total_and_as_listed() -> None:
    for left, one in enumerate(VERSIONS):
        for right, two in enumerate(VERSIONS):
            assert compare_debian(one, two) == (left > right) - (left < right), (one, two)


def test_debian_order_is_that_of_dpkg() -> None:
    for one, two in zip(VERSIONS, VERSIONS[1:]):
        assert subprocess.run(["dpkg", "--compare-versions", one, "lt", two], check=False).returncode == 0


@pytest.mark.parametrize(
    ("left", "right", "order"),
    [
        # rpm's own test cases (tests/rpmvercmp.at)
        ("1.0", "1.0", 0),
        ("1.0", "2.0", -1),
        ("2.0.1", "2.0.1a", -1),
        ("5.5p1", "5.5p10", -1),
        ("10xyz", "10.1xyz", -1),
        ("xyz10", "xyz10.1", -1),
        ("xyz.4", "8", -1),
        ("1.0~rc1", "1.0", -1),
        ("1.0~rc1", "1.0~rc2", -1),
        ("1.0^", "1.0", 1),
        ("1.0^git1", "1.01", -1),
        ("1.0^git1", "1.0^git2", -1),
        ("20101121", "20101122", -1),
        ("3:580.95.05-1.el9", "3:580.126.09-1.el9", -1),
        ("580.95.05", "3:580.95.05", -1),
        ("580.95.05-1.el9", "580.95.05", 0),
    ],
)
def test_rpm_order(left: str, right: str, order: int) -> None:
    assert compare_rpm(left, right) == order


def test_rpm_order_both_ways() -> None:
    assert compare_rpm("580.126.09-1.el9", "580.95.05-1.el9") == 1
    assert compare_rpm("580.95.05-1.el9", "580.126.09-1.el9") == -1


@pytest.mark.parametrize(
    ("version", "wanted", "answer"),
    [
        ("1.17.4-1", "", True),
        ("1.17.4-1", "1.17.4-1", True),
        ("1.17.4-1", "1.17.4", True),
        ("1.17.4-1", "1.17", True),
        ("1.17.4-1", "1.1", False),
        ("5:28.3.3-1~debian.12~bookworm", "28.3.3", True),
        ("5:28.3.3-1~debian.12~bookworm", "28.3.3-1~debian.12~bookworm", True),
        ("580.95.05-0ubuntu1", "580.95", True),
        ("580.95.05-0ubuntu1", "58", False),
    ],
)
def test_matches_version(version: str, wanted: str, answer: bool) -> None:
    assert matches_version(version, wanted) is answer
