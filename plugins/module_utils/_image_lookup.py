# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What the registry says of one image, asked with a host's login, proxies and trust."""

from __future__ import annotations

import typing as t

from ._errors import FleetError
from ._host import Host
from ._image_reference import ImageReference
from ._nim_family import detect_family
from ._nim_image import NimImages
from ._registry import RegistryClient
from ._registry_image import image_architecture
from ._sleeping_docker import look_at_docker

#: Refusals that answer the question "may this host have the image", rather than fail to ask it.
REGISTRY_REASONS = frozenset(
    (
        "no_key",
        "bad_key",
        "no_entitlement",
        "no_such_repository",
        "no_such_tag",
        "legal",
        "rate_limit",
        "registry_unreachable",
        "registry_error",
        "unauthorized",
        "identity_token",
        "tls_error",
        "architecture",
    )
)


def look_up(
    host: Host,
    image: str,
    api_key: t.Optional[str] = None,
    docker_user: str = "root",
    registry_mirrors: t.Any = None,
    architecture: t.Optional[str] = None,
    client: t.Callable[..., RegistryClient] = RegistryClient,
) -> t.Dict[str, t.Any]:
    """Return values of ``nim_image_info`` for an image that the registry hands out.

    Raises:
        FleetError: ``invalid_option``, those of the Docker configuration, and :data:`REGISTRY_REASONS`.
    """
    resource = NimImages(
        [{"image": image}],
        registry_mirrors=registry_mirrors,
        api_key=api_key,
        docker_user=docker_user,
        # Only how it reaches registries is asked.
        api=look_at_docker(host),
        client=client,
    )
    wanted = resource.wanted[0].reference
    reference = wanted.rewritten(resource.mirrors)
    credentials = resource.credentials(host, reference.registry)
    registry = resource.registries.client(reference.registry, credentials)
    found = registry.resolve(reference, architecture or image_architecture(host.machine()))
    sizes = registry.compressed_sizes(reference) or {found.architecture: found.compressed_size}
    return {
        "reference": found.reference,
        "with_key": credentials is not None,
        "public": _public(resource, reference, found.architecture) if credentials else True,
        "digest": found.digest,
        "platform_digest": found.platform_digest,
        "architecture": found.architecture,
        "architectures": list(found.architectures),
        "compressed_size": found.compressed_size,
        "compressed_sizes": sizes,
        "created": found.created,
        "cuda_version": found.environment.get("CUDA_VERSION"),
        "require_cuda": found.environment.get("NVIDIA_REQUIRE_CUDA"),
        "family": detect_family(found.labels, found.environment, wanted.tag).key,
        "labels": found.labels,
    }


def _public(resource: NimImages, reference: ImageReference, architecture: str) -> t.Optional[bool]:
    """Whether the registry hands the image out without a key too; None when it does not say."""
    try:
        resource.registries.client(reference.registry, None).resolve(reference, architecture)
    except FleetError as error:
        # What one is told without a key about a repository that is there: that it wants one.
        return False if error.reason in ("no_key", "no_entitlement", "no_such_repository") else None
    return True
