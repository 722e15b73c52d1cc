# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The manifest of model profiles inside an image on the host, read without starting a container: no GPU and no key is needed.

Where a manifest lies in the image is what NVIDIA's documentation says of each family, and what NVIDIA/k8s-nim-operator tries.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._host import Host
from ._nim_profiles import Profile, parse_manifest

Json = t.Dict[str, t.Any]

MANIFEST_PATHS = (
    "/opt/nim/etc/default/model_manifest.yaml",
    "/etc/nim/config/model_manifest.yaml",
    "/opt/nim/etc/config/default/model_manifest.yaml",
)


@dataclass(frozen=True)
class Manifest:
    """The profiles of an image.

    Attributes:
        certain: Whether nothing that was not looked at could replace the file.
    """

    profiles: tuple[Profile, ...]
    certain: bool = True


def manifest_on_disk(host: Host, image: Json) -> Manifest | None:
    """The manifest of an image on the host, from the directories of its layers; runs no command.

    Args:
        image: As ``docker image inspect`` describes it.

    Returns:
        None where the layers are no directories (the containerd image store), or hold no manifest.
    """
    data = (image.get("GraphDriver") or {}).get("Data") or {}
    upper, lower = str(data.get("UpperDir") or ""), str(data.get("LowerDir") or "")
    return _manifest_below(host, [layer for layer in [upper, *lower.split(":")] if layer.startswith("/")])


def manifest_in_container(host: Host, image: Json, container: Json | None) -> Manifest | None:
    """The same from the root of a container that runs this very image; None where it does not run.

    Args:
        container: As ``docker container inspect`` describes it.
    """
    state = (container or {}).get("State") or {}
    pid = state.get("Pid")
    if container is None or not state.get("Running") or not pid or container.get("Image") != image.get("Id"):
        return None
    return _manifest_below(host, ["/proc/%d/root" % pid])


def _manifest_below(host: Host, directories: t.Sequence[str]) -> Manifest | None:
    for directory in directories:
        for path in MANIFEST_PATHS:
            text = _read_inside(host, directory, path)
            if text is not None:
                profiles = parse_manifest(text)
                return None if profiles is None else Manifest(profiles)
    return None


def _read_inside(host: Host, layer: str, path: str) -> str | None:
    """A file of a layer; a link in it would lead to the host's own files."""
    current = layer
    for part in path.strip("/").split("/"):
        current += "/" + part
        if host.read_link(current) is not None:
            return None
    try:
        return host.read_text(current)
    except FleetError:
        # A file that an upper layer has removed is a device file there.
        return None
