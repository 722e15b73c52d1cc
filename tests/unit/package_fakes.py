# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Repositories and keys for the tests of the package tools."""

from __future__ import annotations

import base64

from ansible_collections.gpu_fleet.nim.plugins.module_utils._packages import PackageManager, Repository
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Change

KEY = b"\x99\x01\x0d" + bytes(range(200))
ARMORED = (
    b"-----BEGIN PGP PUBLIC KEY BLOCK-----\nVersion: GnuPG v2\n\n%s\n=ab12\n-----END PGP PUBLIC KEY BLOCK-----\n"
    % b"\n".join(base64.b64encode(KEY)[index : index + 64] for index in range(0, len(base64.b64encode(KEY)), 64))
)
REPOSITORY = Repository(
    name="docker",
    url="https://download.docker.com/linux/ubuntu",
    key_url="https://download.docker.com/linux/ubuntu/gpg",
    suite="noble",
    components=("stable",),
)
FLAT = Repository(
    name="toolkit", url="https://nvidia.github.io/x/stable/deb/amd64", key_url="https://nvidia.github.io/gpgkey"
)


def changes(manager: PackageManager, repository: Repository = REPOSITORY) -> list[Change]:
    return manager.plan_repository("r", repository, manager.repository_state(repository))
