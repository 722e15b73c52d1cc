# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""File systems of a host."""

from __future__ import annotations

from ansible_collections.gpu_fleet.nim.plugins.module_utils._disk_space import mount_of, mount_points


def test_mounts() -> None:
    text = "1 1 8:1 / / rw - ext4 a rw\n2 1 8:2 / /var/lib/docker rw - x b rw\n3 1 8:3 / /mnt/a\\040b rw - x c rw\n\n"
    mounts = mount_points(text)
    assert mounts == ["/", "/var/lib/docker", "/mnt/a b"]
    assert mount_of("/var/lib/docker", mounts) == "/var/lib/docker"
    assert mount_of("/var/lib/docker2", mounts) == "/"
    assert mount_of("/mnt/a b/c", mounts) == "/mnt/a b"
    assert mount_of("/x", []) == "/"
