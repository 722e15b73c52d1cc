# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which images are wanted on a host, as tags pinned to digests, and what differs."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ._docker_api import DockerApi
from ._errors import FleetError
from ._host import Host
from ._image_record import PinnedImage, read_record
from ._image_reference import DOCKER_HUB, ImageReference, check_mirrors
from ._ngc_key import check_api_key
from ._registry_image import RegistryImage, foreign_architecture
from ._resource import Change, Planner
from ._wanted_images import WantedImage, parse_images

#: Disk space of an unpacked image per byte of download; NVIDIA's image for DGX Spark takes 32 GB from 9.88 GB.
DISK_FACTOR = 3.3
#: Tries of one pull in all; the pauses between them are 2, 4, 8 … seconds, at most 60.
RETRIES = 5

PULL_MISSING = "missing"
PULL_NEWER = "newer"
PULL_NEVER = "never"


@dataclass(frozen=True)
class ImageState:
    """One wanted image as it is on the host.

    Attributes:
        pinned: Entry of the record, or None.
        local: ``docker image inspect`` of the pinned image, else of whatever carries the wanted name, or None.
        present: ``local`` is what the record pins (or the wanted digest names), and this host can run it.
        named: Identifier of the image that carries the wanted name, whatever the record pins; empty when none does.
        newer: What the tag stands for at the registry; asked only for pull = newer.
        users: Names of the containers that use ``local``; looked at only for state = absent.
        foreign: Architecture that ``local`` was built for, where this host is another one.
    """

    wanted: WantedImage
    source: ImageReference
    pinned: t.Optional[PinnedImage]
    local: t.Optional[t.Mapping[str, t.Any]]
    present: bool
    named: str = ""
    newer: t.Optional[RegistryImage] = None
    users: t.Tuple[str, ...] = ()
    foreign: str = ""


@dataclass(frozen=True)
class ImagesState:
    """All wanted images; ``docker`` is False when no daemon answers."""

    docker: bool
    images: t.Tuple[ImageState, ...]


class ImagesPlanner(Planner[ImagesState]):
    """Images on a host.

    Args:
        images: See :func:`parse_images`.
        pull: ``missing`` keeps what a tag was pinned to; ``newer`` follows a tag that has moved, as far as the registry is
            asked; ``never`` takes only what is on the host (air gap).
        registry_mirrors: See :func:`._image_reference.check_mirrors`.
        api_key: NGC key for nvcr.io in place of the stored login.
        docker_user: User whose Docker configuration holds the login.
        retries: Tries of a pull.
        disk_factor: Disk space of an unpacked image per byte of download.

    Raises:
        FleetError: ``invalid_option``.
    """

    name = "nim_image"

    def __init__(
        self,
        images: t.Any,
        *,
        pull: str = PULL_MISSING,
        registry_mirrors: t.Any = None,
        api_key: str | None = None,
        docker_user: str = "root",
        retries: int = RETRIES,
        disk_factor: float = DISK_FACTOR,
        api: DockerApi | None = None,
    ) -> None:
        self.wanted = parse_images(images)
        self.pull = pull
        self.mirrors = check_mirrors(registry_mirrors)
        self.key = check_api_key(api_key) if api_key else ""
        self.docker_user = docker_user
        if retries < 1:
            raise FleetError("invalid_option", "retries = %d: at least one try is needed; give 1 or more." % retries)
        if disk_factor < 1:
            raise FleetError(
                "invalid_option",
                "disk_factor = %s: an image is larger on disk than packed; give 1 or more." % disk_factor,
            )
        self.retries = retries
        self.disk_factor = disk_factor
        self.api = api or DockerApi()

    # -- observe ----------------------------------------------------------------------------------

    def observe(self, host: Host) -> ImagesState:
        """Reads the record and asks Docker."""
        record = read_record(host)
        docker = self.api.available()
        containers: t.Optional[t.List[t.Dict[str, t.Any]]] = None
        found = []
        for wanted in self.wanted:
            source = wanted.reference.rewritten(self.mirrors)
            pinned = record.get(str(wanted.reference))
            local: t.Optional[t.Mapping[str, t.Any]] = None
            present = False
            if docker:
                if pinned is not None:
                    local = self.api.image(pinned.run)
                    present = local is not None
                if local is None:
                    for name in (str(wanted.reference), str(source)):
                        local = self.api.image(name)
                        if local is not None:
                            break
            foreign = foreign_architecture(local, host.machine())
            present = present and not foreign
            named = ""
            if present and human_name(wanted.reference):
                named = str((self.api.image(human_name(wanted.reference)) or {}).get("Id", ""))
            newer = None
            if self.pull == PULL_NEWER and wanted.state == "present" and not wanted.reference.digest:
                newer = self.at_registry(host, source)
            users: t.Tuple[str, ...] = ()
            if wanted.state == "absent" and local is not None:
                if containers is None:
                    containers = self.api.containers(all=True)
                users = tuple(
                    str((entry.get("Names") or [entry.get("Id", "?")[:12]])[0]).lstrip("/")
                    for entry in containers
                    if entry.get("ImageID") == local.get("Id")
                )
            found.append(ImageState(wanted, source, pinned, local, present, named, newer, users, foreign))
        return ImagesState(docker, tuple(found))

    def at_registry(self, host: Host, source: ImageReference) -> RegistryImage | None:
        """What a tag stands for now; None where no registry is asked."""
        return None

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, state: ImagesState) -> t.List[Change]:
        changes = []
        for image in state.images:
            change = self._plan_absent(image) if image.wanted.state == "absent" else self._plan_present(image, state)
            if change is None:
                change = self._plan_tag(image)
            if change is not None:
                changes.append(change)
        return changes

    def _plan_tag(self, image: ImageState) -> t.Optional[Change]:
        """The pinned image shall carry the wanted name: people use it, and ``docker image prune`` goes by it."""
        reference, local = image.wanted.reference, image.local
        if image.wanted.state != "present" or not image.present or local is None or not human_name(reference):
            return None
        if image.named == str(local.get("Id", "")):
            return None
        return Change(
            self.name,
            "tag %s" % human_name(reference),
            image.named or None,
            str(local.get("Id", "")),
            "somebody gave the name to another image" if image.named else "somebody took the name from the image",
            action="tag",
            data={"image_id": str(local.get("Id", "")), "reference": reference},
        )

    def _plan_present(self, image: ImageState, state: ImagesState) -> t.Optional[Change]:
        what = "image %s" % image.wanted.reference
        pinned = image.pinned
        before = pinned.digest or pinned.image_id if pinned and image.present else None
        if image.newer is not None and (pinned is None or pinned.digest != image.newer.digest or not image.present):
            return Change(
                self.name,
                what,
                before,
                image.newer.digest,
                "the tag stands for another image now" if before else "it is not on the host",
                action="pull",
                data={"image": image, "reference": image.source.with_digest(image.newer.digest)},
            )
        if image.present:
            return None
        if image.foreign:
            return self._plan_foreign(image)
        lost = pinned is not None and pinned.digest
        if image.local is not None and not lost:
            adopted = self._adopt(image)
            return Change(
                self.name,
                what,
                before,
                adopted.digest or adopted.image_id,
                "it is on the host and not pinned yet",
                action="pin",
                data={"image": image, "pinned": adopted},
            )
        if self.pull == PULL_NEVER:
            raise FleetError(
                "image_missing",
                "Image %s is not on the host and pull is never; load it (docker load) or set pull to missing."
                % image.wanted.reference,
                image=str(image.wanted.reference),
            )
        reference = image.source.with_digest(pinned.digest) if pinned and lost else image.source
        return Change(
            self.name,
            what,
            None,
            reference.digest or "the digest of tag %s" % reference.tag,
            "it is no longer on the host" if lost else "it is not on the host",
            action="pull",
            data={"image": image, "reference": reference},
        )

    def _plan_foreign(self, image: ImageState) -> Change:
        """The name, or what it was pinned to, is another machine's image.

        A pin to that image is not kept, as it could never run here; one to an image that is gone is.
        """
        if self.pull == PULL_NEVER:
            raise FleetError(
                "architecture",
                "Image %s on this host is built for %s, which this host is not, and pull is never; load the one for this "
                "host (docker load) or set pull to missing." % (image.wanted.reference, image.foreign),
                image=str(image.wanted.reference),
                architecture=image.foreign,
            )
        pinned, local_id = image.pinned, str((image.local or {}).get("Id", ""))
        good = pinned is not None and pinned.digest and pinned.image_id != local_id
        reference = image.source.with_digest(pinned.digest) if pinned and good else image.source
        return Change(
            self.name,
            "image %s" % image.wanted.reference,
            local_id,
            reference.digest or "the digest of tag %s" % reference.tag,
            "the one on the host is built for %s" % image.foreign,
            action="pull",
            data={"image": image, "reference": reference},
        )

    def _plan_absent(self, image: ImageState) -> t.Optional[Change]:
        if image.local is None and image.pinned is None:
            return None
        before = (image.pinned and (image.pinned.digest or image.pinned.image_id)) or str(
            (image.local or {}).get("Id", "")
        )
        return Change(
            self.name,
            "image %s" % image.wanted.reference,
            before,
            None,
            "it is to be removed",
            action="remove",
            data={"image": image},
            blocked="in use by container %s: remove that first" % ", ".join(image.users) if image.users else None,
        )

    def _adopt(self, image: ImageState) -> PinnedImage:
        """Pin what is on the host: its digest in the wanted repository, or its id where it came from an archive."""
        local = image.local or {}
        digests = dict(
            entry.split("@", 1) for entry in reversed([text for text in local.get("RepoDigests") or [] if "@" in text])
        )
        for name in (image.wanted.reference.name, image.source.name):
            # Docker shortens the names of its own hub.
            for known in (name, name.replace(DOCKER_HUB + "/library/", "", 1), name.replace(DOCKER_HUB + "/", "", 1)):
                if known in digests:
                    return PinnedImage(str(image.wanted.reference), name, digests[known], str(local.get("Id", "")))
        return PinnedImage(str(image.wanted.reference), image.source.name, "", str(local.get("Id", "")))

    # -- return values ----------------------------------------------------------------------------

    def result(self, state: ImagesState) -> t.Dict[str, t.Any]:
        """Return values of the module."""
        images = []
        for image in state.images:
            pinned = image.pinned
            images.append(
                {
                    "image": str(image.wanted.reference),
                    "present": image.present,
                    "digest": pinned.digest or None if pinned else None,
                    "image_id": pinned.image_id if pinned else None,
                    "run": pinned.run if pinned else None,
                    "size": int(image.local.get("Size") or 0) if image.local and image.present else None,
                }
            )
        return {"images": images}


def human_name(reference: ImageReference) -> str:
    """The name that an image carries for people; empty where a digest alone is wanted."""
    return "%s:%s" % (reference.name, reference.tag) if reference.tag else ""
