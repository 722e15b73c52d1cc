# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The manifest of model profiles of an image that is at the registry alone, or whose layers are no directories of the host."""

from __future__ import annotations

import io
import posixpath
import tarfile
import typing as t
import zlib

from ._host import Host
from ._image_reference import ImageReference
from ._nim_manifest import MANIFEST_PATHS, Manifest
from ._nim_profiles import parse_manifest
from ._registry import RegistryClient
from ._registry_image import RegistryImage

#: A layer of more bytes, packed and unpacked, is not fetched for a file of some kilobytes, nor are all of them together.
LAYER_MOST = 8 * 1024 * 1024
UNPACKED_MOST = 64 * 1024 * 1024
LAYERS_MOST = 32 * 1024 * 1024
#: Seconds for a container that prints a file.
_CONTAINER_TIMEOUT = 60.0


def manifest_by_container(host: Host, image: str) -> Manifest | None:
    """The manifest of an image on the host, printed by a container without GPUs, network or rights that is gone after it.

    Args:
        image: Image as ``docker run`` is told.
    """
    for path in MANIFEST_PATHS:
        command = ["docker", "run", "--rm", "--pull=never", "--runtime=runc", "--network=none", "--log-driver=none"]
        command += ["--cap-drop=ALL", "--security-opt=no-new-privileges", "--entrypoint=cat", image, path]
        answer = host.run(command, timeout=_CONTAINER_TIMEOUT)
        profiles = parse_manifest(answer.stdout) if answer.ok else None
        if profiles is not None:
            return Manifest(profiles)
    return None


def manifest_at_registry(client: RegistryClient, reference: ImageReference, image: RegistryImage) -> Manifest | None:
    """The manifest of an image at the registry, from its small layers, the last one first.

    Layers with engines and libraries are left out, so a manifest in one of them is not found.

    Raises:
        FleetError: As the client.
    """
    certain = True
    fetched = 0
    removed: set[str] = set()
    for digest, size in reversed(image.layers):
        if size > LAYER_MOST or fetched + size > LAYERS_MOST:
            certain = False
            continue
        fetched += size
        found = _find_in_layer(client.blob(reference, digest), [path for path in MANIFEST_PATHS if path not in removed])
        if found is None:
            certain = False
            continue
        texts, gone = found
        for path in MANIFEST_PATHS:
            if path in texts and path not in removed:
                profiles = parse_manifest(texts[path])
                return None if profiles is None else Manifest(profiles, certain)
        removed |= gone
    return None


def _find_in_layer(packed: bytes, paths: t.Sequence[str]) -> tuple[dict[str, str], set[str]] | None:
    """Texts of the files that a layer holds, and those that it takes away from the layers below (OCI image specification,
    whiteouts); None when the layer cannot be read."""
    data = packed
    if packed[:2] == b"\x1f\x8b":
        unpacker = zlib.decompressobj(wbits=31)
        try:
            data = unpacker.decompress(packed, UNPACKED_MOST)
        except zlib.error:
            return None
        if unpacker.unconsumed_tail:
            return None
    texts: dict[str, str] = {}
    gone: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                name = "/" + posixpath.normpath(member.name.lstrip("./"))
                directory, base = posixpath.split(name)
                if base == ".wh..wh..opq":
                    gone |= {path for path in MANIFEST_PATHS if path.startswith(directory.rstrip("/") + "/")}
                elif base.startswith(".wh."):
                    hidden = posixpath.join(directory, base[len(".wh.") :])
                    gone |= {path for path in MANIFEST_PATHS if (path + "/").startswith(hidden + "/")}
                elif name in paths and member.isfile():
                    stream = archive.extractfile(member)
                    if stream is not None:
                        texts[name] = stream.read().decode("utf-8", "replace")
    except (tarfile.TarError, EOFError, ValueError):
        return None
    return texts, gone
