# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The list of images that are wanted on a host."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._image_reference import ImageReference
from ._nim_downloads import needs_download
from ._nim_models import NimModel, parse_models, parse_size
from ._untrusted import GO_TRUE

#: Variables of NIM with which a profile takes another amount of memory on each GPU, or as much as there is.
_CHANGE_MEMORY = (
    "NIM_LOW_MEMORY_MODE",
    "NIM_PIPELINE_PARALLEL_SIZE",
    "NIM_RELAX_MEM_CONSTRAINTS",
    "NIM_TENSOR_PARALLEL_SIZE",
)


@dataclass(frozen=True)
class WantedProfile:
    """The profile with which a model will run an image.

    Attributes:
        model: Name of the model, for messages.
        gpus: How many GPUs it gets; None = as many as the profile needs, or all.
        memory: Whether it needs the memory that the profile's description names, see :func:`takes_profile_memory`.
    """

    model: str
    profile: str
    gpus: t.Optional[int] = None
    lora: bool = False
    memory: bool = True


@dataclass(frozen=True)
class ImageUser:
    """A model that will run an image.

    Attributes:
        model: Its name; empty where it is not told.
        gpus: How many GPUs it gets; None = as many as its profile needs, or all.
        named: Those that it names, by index or UUID.
    """

    model: str = ""
    gpus: t.Optional[int] = None
    named: t.Tuple[str, ...] = ()


@dataclass(frozen=True)
class WantedImage:
    """One entry of the list of images.

    Attributes:
        reference: As the user wrote it, normalised.
        state: ``present`` or ``absent``.
        spaces: Bytes that model files will take in a directory, for each model that runs this image; an empty directory
            stands for Docker's disk.
        check_requirement: Whether the image's NVIDIA_REQUIRE_* must be met by the driver.
        profiles: What the models that name a profile want of it.
        users: Who will run it with what is required of the driver and the GPUs.
    """

    reference: ImageReference
    state: str = "present"
    spaces: t.Tuple[t.Tuple[str, int], ...] = ()
    check_requirement: bool = True
    profiles: t.Tuple[WantedProfile, ...] = ()
    users: t.Tuple[ImageUser, ...] = ()


def takes_profile_memory(model: NimModel) -> bool:
    """Whether a model takes the memory that the description of its profile names: that is for NIM's own settings.

    A shorter context takes less, more GPUs share it, arguments of the engine may change it to either side, and the operator may
    have told NIM not to insist.
    """
    settled = model.max_model_length is None and not model.engine_arguments
    return settled and not any(name in model.environment for name in _CHANGE_MEMORY)


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
        profiles = known.profiles if known else ()
        if entry.get("profile"):
            name = str(entry.get("model") or reference)
            memory = entry.get("profile_memory") is not False
            wish = WantedProfile(name, str(entry["profile"]), entry.get("gpus"), bool(entry.get("lora")), memory)
            profiles += (wish,)
        users = known.users if known else ()
        if entry.get("check_requirement") is not False:
            gpu_names = tuple(str(gpu) for gpu in entry.get("gpu_names") or [])
            users += (ImageUser(str(entry.get("model") or ""), entry.get("gpus"), gpu_names),)
        found[str(reference)] = WantedImage(reference, state, spaces, insists, profiles, users)
    return list(found.values())


def wanted_images(raw: t.Any, variable: str = "nim_models") -> t.List[t.Dict[str, t.Any]]:
    """What the models of a host need, as entries for ``gpu_fleet.nim.nim_image``; an image may be there twice.

    Raises:
        FleetError: As :func:`._nim_models.parse_models`.
    """
    images: t.List[t.Dict[str, t.Any]] = []
    for entry, model in zip(raw or [], parse_models(raw, variable)):
        if model.state == "absent":
            continue
        image: t.Dict[str, t.Any] = {
            "image": model.image,
            "model": model.name,
            "cache_directory": model.cache_directory,
            # As libnvidia-container reads it, by Go's ParseBool.
            "check_requirement": model.environment.get("NVIDIA_DISABLE_REQUIRE") not in GO_TRUE,
        }
        if entry.get("disk_space"):
            image["disk_space"] = entry["disk_space"]
        if model.profile and model.profile != "default" and needs_download(model):
            image.update(profile=model.profile, lora=model.lora_directory is not None)
            image["profile_memory"] = takes_profile_memory(model)
        if isinstance(model.gpus, (int, tuple)):
            image["gpus"] = model.gpus if isinstance(model.gpus, int) else len(model.gpus)
        if isinstance(model.gpus, tuple):
            image["gpu_names"] = list(model.gpus)
        images.append(image)
    return images
