# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What the documents of a registry say of an image (OCI image specification): digests, layers, environment, labels."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ._errors import FleetError
from ._untrusted import MapOf, misfit

#: Kernel's machine name -> the name in image manifests.
_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def image_architecture(machine: str) -> str:
    """``x86_64`` -> ``amd64``, ``aarch64`` -> ``arm64``; others unchanged."""
    return _ARCHITECTURES.get(machine, machine)


def foreign_architecture(local: t.Optional[t.Mapping[str, t.Any]], machine: str) -> str:
    """Architecture for which an image on a host was built, where the host's machine is another; empty where it fits.

    Args:
        local: ``docker image inspect``; what does not tell its architecture, as some archives, counts as fitting.
    """
    built_for = image_architecture(str((local or {}).get("Architecture") or ""))
    return built_for if built_for != image_architecture(machine) else ""


@dataclass(frozen=True)
class RegistryImage:
    """One image as the registry describes it.

    Attributes:
        reference: The reference that was asked for, at the place it was asked for.
        digest: Digest that ``docker pull`` by this reference would record: of the index where there is one.
        platform_digest: Digest of the manifest for the architecture; equal to ``digest`` without an index.
        architecture: Architecture of that manifest, for example ``amd64``.
        architectures: All architectures on offer.
        layers: Digest and compressed size in bytes of each layer, base first.
        environment, labels: From the image's configuration.
        created: Time stamp in the configuration, or empty.
    """

    reference: str
    digest: str
    platform_digest: str
    config_digest: str
    architecture: str
    architectures: t.Tuple[str, ...]
    layers: t.Tuple[t.Tuple[str, int], ...]
    environment: t.Dict[str, str] = field(default_factory=dict)
    labels: t.Dict[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def compressed_size(self) -> int:
        """Bytes to download when no layer is there yet."""
        return sum(size for _digest, size in dict(self.layers).items())


INDEX = {"manifests": [{"digest": str, "platform": {"os": str, "architecture": str}}]}
MANIFEST = {"layers": [{"digest": str, "size": int}], "config": {"digest": str}}
CONFIGURATION = {"architecture": str, "created": str, "config": {"Env": [str], "Labels": MapOf(str)}}


def shaped(document: t.Dict[str, t.Any], shape: t.Any, what: str, name: str) -> t.Dict[str, t.Any]:
    """The document, which is what the OCI image specification promises as far as it is read here."""
    wrong = misfit(document, shape)
    if wrong:
        raise FleetError(
            "registry_error",
            "The %s of %s is not what the OCI image specification promises (%s); use a tag that was pushed by another "
            "program, or look for a proxy that changes what passes through it." % (what, name, wrong),
            image=name,
        )
    return document


def offered(index: t.Mapping[str, t.Any]) -> t.Dict[str, str]:
    """Digest of the manifest for each architecture of Linux."""
    found: t.Dict[str, str] = {}
    for entry in index.get("manifests") or []:
        platform = entry.get("platform") or {}
        # Attestations are listed with the platform unknown/unknown.
        if platform.get("os") == "linux" and platform.get("architecture"):
            found.setdefault(platform["architecture"], entry.get("digest") or "")
    return found


def layers_of(manifest: t.Dict[str, t.Any], name: str) -> t.Tuple[t.Tuple[str, int], ...]:
    """Digest and compressed size of each layer."""
    if not isinstance(manifest.get("layers"), list) or not isinstance(manifest.get("config"), dict):
        kind = manifest.get("mediaType") or "schema %s" % manifest.get("schemaVersion")
        raise FleetError(
            "registry_error",
            "The manifest of %s is of a kind that is not supported (%s); use a tag that was pushed in the Docker v2 or "
            "OCI format." % (name, str(kind)[:100]),
            image=name,
        )
    layers = shaped(manifest, MANIFEST, "manifest", name)["layers"]
    return tuple((layer.get("digest") or "", max(0, layer.get("size") or 0)) for layer in layers)


def wrong_architecture(name: str, wanted: str, offered: t.Sequence[str]) -> FleetError:
    return FleetError(
        "architecture",
        "%s is built for %s, and this host is %s; use a tag or repository for %s%s."
        % (
            name,
            ", ".join(offered) or "no Linux architecture",
            wanted,
            wanted,
            " (for DGX Spark the name ends in -dgx-spark)" if wanted == "arm64" else "",
        ),
        image=name,
        architecture=wanted,
        architectures=list(offered),
    )
