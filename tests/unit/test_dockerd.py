# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon as it runs: its flags, and two spellings of one runtime."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._dockerd import flag_values, same_program


def test_flags_of_dockerd() -> None:
    found = flag_values(
        [
            "dockerd",
            "-H",
            "fd://",
            "--containerd=/run/c.sock",
            "-D",
            "--live-restore",
            "--log-driver",
            "journald",
            "--default-ulimit",
            "memlock=-1",
            "-sfoo",
        ]
    )
    assert found == {
        "hosts": ["fd://"],
        "containerd": ["/run/c.sock"],
        "debug": ["true"],
        "live-restore": ["true"],
        "log-driver": ["journald"],
        "default-ulimits": ["memlock=-1"],
        "storage-driver": ["foo"],
    }


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("x", "/usr/bin/x", True),
        ("/usr/bin/x", "x", True),
        ("x", "/opt/x", False),
        ("/usr/bin/x", "/opt/x", False),
        ("a", "/usr/bin/a", True),
        ("a", "/usr/local/bin/a", False),
    ],
)
def test_same_program(left: str, right: str, same: bool) -> None:
    programs = {"x": None, "a": "/usr/bin/a", "/usr/bin/a": "/usr/bin/a", "/usr/local/bin/a": "/usr/local/bin/a"}
    assert same_program(left, right, programs) is same
