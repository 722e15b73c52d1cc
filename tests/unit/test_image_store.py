# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where images lie: below Docker's data-root, or in containerd's store."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_registries import with_daemon_options
from ansible_collections.gpu_fleet.nim.plugins.module_utils._image_store import (
    containerd_root,
    containerd_store,
    image_directory,
)
from fake_host import FakeHost

#: As engines 26 and 29 with each store say it.
CLASSIC: dict[str, t.Any] = {
    "Driver": "overlay2",
    "DriverStatus": [["Backing Filesystem", "extfs"], ["Supports d_type", "true"]],
    "DockerRootDir": "/data/docker",
}
CONTAINERD: dict[str, t.Any] = {
    "Driver": "overlayfs",
    "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
    "DockerRootDir": "/data/docker",
}
CONFIG = "/etc/containerd/config.toml"


def test_which_store() -> None:
    assert [containerd_store(info) for info in (CLASSIC, CONTAINERD, {}, {"DriverStatus": None})] == [
        False,
        True,
        None,
        False,
    ]


def test_directory() -> None:
    host = FakeHost()
    assert image_directory(host, CLASSIC) == "/data/docker"
    assert image_directory(host, {}) == "/var/lib/docker"
    # The data-root does not move it.
    assert image_directory(host, CONTAINERD) == "/var/lib/containerd"
    system = {**CONTAINERD, "Containerd": {"Address": "/run/containerd/containerd.sock"}}
    assert image_directory(host, system) == "/var/lib/containerd"
    own = {**CONTAINERD, "Containerd": {"Address": "/var/run/docker/containerd/containerd.sock"}}
    assert image_directory(host, own) == "/data/docker"


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("", "/var/lib/containerd"),
        ('disabled_plugins = ["cri"]\n#root = "/var/lib/containerd"\n', "/var/lib/containerd"),
        ('version = 2\nroot = "/data/containerd"\nstate = "/run/containerd"\n[grpc]\n', "/data/containerd"),
        ("  root='/data/containerd' # moved\n", "/data/containerd"),
        ('[plugins."io.containerd.x"]\n  root = "/elsewhere"\n', "/var/lib/containerd"),
        ("root = \x00[[[", "/var/lib/containerd"),
    ],
)
def test_root_of_containerd(text: str, root: str) -> None:
    assert containerd_root(FakeHost({CONFIG: text.encode()})) == root


def test_the_store_that_a_daemon_is_told_to_use() -> None:
    told = with_daemon_options(CLASSIC, {"features": {"containerd-snapshotter": True}})
    assert image_directory(FakeHost(), told) == "/var/lib/containerd"
    told = with_daemon_options(CONTAINERD, {"features": {"containerd-snapshotter": False}})
    assert image_directory(FakeHost(), told) == "/data/docker"
    assert with_daemon_options(CONTAINERD, {"features": {"cdi": True}}) == CONTAINERD
