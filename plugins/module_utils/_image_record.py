# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What the tags of images are pinned to on a host.

It stands in ``/var/lib/gpu_fleet/images.json``, so that later runs and ``nim_service`` know it without asking a
registry.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import typing as t
from dataclasses import dataclass

from ._host import Host
from ._image_reference import ImageReference
from ._own_state import read_own_state, unreadable
from ._untrusted import MapOf

STATE_DIRECTORY = "/var/lib/gpu_fleet"
RECORD = STATE_DIRECTORY + "/images.json"
_RECORD_SCHEMA = 1
_SHAPE = {"schema": int, "images": MapOf({"source": str, "digest": str, "image_id": str})}
#: Only root and short: two jobs that end together must not lose each other's entry.
RECORD_LOCK = "/run/gpu_fleet/images.lock"


@dataclass(frozen=True)
class PinnedImage:
    """What a reference stands for on this host.

    Attributes:
        image: The reference as it is wanted, normalised: the key of the record.
        source: Registry and repository it was pulled from, which differs from ``image`` behind a mirror.
        digest: Digest in that repository; empty for an image that was loaded from an archive.
        image_id: Docker's id of the image.
        run: What to give to ``docker run``: it names exactly this image.
    """

    image: str
    source: str
    digest: str
    image_id: str

    @property
    def run(self) -> str:
        return "%s@%s" % (self.source, self.digest) if self.digest else self.image_id

    def as_dict(self) -> t.Dict[str, str]:
        return {"source": self.source, "digest": self.digest, "image_id": self.image_id}


def read_record(host: Host) -> t.Dict[str, PinnedImage]:
    """Everything that is pinned on a host, by normalised reference.

    Raises:
        FleetError: ``state_unreadable`` when the file is broken; it is left as it is.
    """
    remedy = "the tags are then taken from the images on the host again"
    found = read_own_state(host, RECORD, _SHAPE, remedy)
    if found is None:
        return {}
    if found["schema"] != _RECORD_SCHEMA:
        raise unreadable(RECORD, "its schema is %d, not %d" % (found["schema"], _RECORD_SCHEMA), remedy)
    return {
        image: PinnedImage(image, entry["source"], entry["digest"], entry["image_id"])
        for image, entry in found["images"].items()
    }


def pinned_image(host: Host, image: str) -> t.Optional[PinnedImage]:
    """What an image that a user named is pinned to on this host, or None when it was never pulled or pinned.

    Raises:
        FleetError: ``invalid_option``, ``state_unreadable``.
    """
    return read_record(host).get(str(ImageReference.parse(image)))


@contextlib.contextmanager
def _locked(path: str) -> t.Iterator[None]:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def update_record(host: Host, image: str, pinned: t.Optional[PinnedImage], lock: str) -> None:
    with _locked(lock):
        record = read_record(host)
        if pinned is None:
            record.pop(image, None)
        else:
            record[image] = pinned
        document = {
            "schema": _RECORD_SCHEMA,
            "images": {name: record[name].as_dict() for name in sorted(record)},
        }
        if not host.exists(STATE_DIRECTORY):
            host.make_dir(STATE_DIRECTORY, mode=0o755)
        host.write_file(RECORD, json.dumps(document, indent=2) + "\n", mode=0o644)
