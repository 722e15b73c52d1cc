# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Where Docker keeps images: below its data-root, or in containerd's store, the default of fresh engines since 29.0.

The data-root does not move containerd's store (docs.docker.com/engine/storage/containerd).
"""

from __future__ import annotations

import re
import typing as t

from ._host import Host

CONTAINERD_CONFIG = "/etc/containerd/config.toml"
CONTAINERD_ROOT = "/var/lib/containerd"
DOCKER_ROOT = "/var/lib/docker"
#: How the daemon says that images are in containerd's store (``docker info``, Storage Driver, driver-type).
DRIVER_TYPE = "io.containerd.snapshotter.v1"

#: Engine 29.5.x answers "error from registry: Incorrect Repository Format" to every pull from nvcr.io as long as it keeps
#: images in containerd's store (NVIDIA/dcgm-exporter#659). Of later ones nothing is known.
_REFUSED = re.compile(r"29\.5(\.|\Z)")

Json = t.Mapping[str, t.Any]


def cannot_pull(version: str) -> bool:
    """Whether an engine with containerd's store cannot pull from nvcr.io."""
    return _REFUSED.match(version) is not None


def containerd_store(info: Json) -> t.Optional[bool]:
    """Whether images are kept in containerd's store.

    Args:
        info: ``docker info``.

    Returns:
        None where the daemon does not say.
    """
    if "DriverStatus" not in info:
        return None
    return any(list(entry)[:2] == ["driver-type", DRIVER_TYPE] for entry in info["DriverStatus"] or [])


def image_directory(host: Host, info: Json) -> str:
    """The directory on whose file system pulled images lie."""
    docker_root = str(info.get("DockerRootDir") or DOCKER_ROOT)
    if not containerd_store(info):
        return docker_root
    address = str((info.get("Containerd") or {}).get("Address") or "")
    # A containerd that dockerd has started for itself, see moby's daemon/internal/libcontainerd/supervisor.
    if "/docker/containerd/" in address:
        return docker_root
    return containerd_root(host)


def containerd_root(host: Host) -> str:
    """``root`` of the system's containerd (containerd-config.toml(5)); files that it imports are not read."""
    text = host.read_text(CONTAINERD_CONFIG) or ""
    head = re.split(r"^[ \t]*\[", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.search(r"""^[ \t]*root[ \t]*=[ \t]*["'](/[^"'\n]*)["']""", head, re.MULTILINE)
    return found.group(1) if found else CONTAINERD_ROOT
