# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The list of images that are wanted on a host."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._image_reference import ImageReference
from ._nim_models import parse_size


@dataclass(frozen=True)
class WantedImage:
    """One entry of the list of images.

    Attributes:
        reference: As the user wrote it, normalised.
        state: ``present`` or ``absent``.
        spaces: Bytes that model files will take in a directory, for each model that runs this image; an empty directory
            stands for Docker's disk.
        check_requirement: Whether the image's NVIDIA_REQUIRE_* must be met by the driver.
    """

    reference: ImageReference
    state: str = "present"
    spaces: t.Tuple[t.Tuple[str, int], ...] = ()
    check_requirement: bool = True


def parse_images(raw: t.Any, option: str = "images") -> t.List[WantedImage]:
    """Read the list of images; an image that several models run is one image, with the disk space of them all.

    Raises:
        FleetError: ``invalid_option``.
    """
    found: t.Dict[str, WantedImage] = {}
    for number, entry in enumerate(raw or []):
        where = "%s[%d]" % (option, number)
        reference = ImageReference.parse(entry.get("image"), where + ".image")
        size = 0
        text = entry.get("disk_space")
        if text not in (None, ""):
            parsed = parse_size(str(text))
            if parsed is None:
                raise FleetError(
                    "invalid_option",
                    "%s.disk_space = %s: not a size with a unit; write it like 20GB." % (where, text),
                )
            size = parsed
        directory = entry.get("cache_directory") or ""
        if directory and not directory.startswith("/"):
            raise FleetError(
                "invalid_option",
                "%s.cache_directory = %s: not an absolute path; begin it with a slash." % (where, directory),
            )
        state = entry.get("state") or "present"
        known = found.get(str(reference))
        if known is not None and known.state != state:
            raise FleetError(
                "invalid_option",
                "%s.image = %s: the image is wanted both present and absent; remove one entry." % (where, reference),
            )
        spaces = known.spaces if known else ()
        if size and (directory, size) not in spaces:
            spaces += ((directory, size),)
        # One model that insists is enough.
        insists = entry.get("check_requirement") is not False or (known is not None and known.check_requirement)
        found[str(reference)] = WantedImage(reference, state, spaces, insists)
    return list(found.values())
