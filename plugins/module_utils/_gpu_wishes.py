# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What the models of a host want of its GPUs: how many, with how much memory, and whether their profiles can run there."""

from __future__ import annotations

import typing as t
from dataclasses import replace

from ._errors import FleetError
from ._gpu import Gpu
from ._gpu_inventory import GpuInventory
from ._gpu_placement import Wish
from ._host import Host
from ._nim_downloads import needs_download
from ._nim_models import GpuRequest, NimModel
from ._nim_process_state import wanted_gpus
from ._wanted_images import ImageUser, takes_profile_memory

if t.TYPE_CHECKING:
    from ._nim_profile_checks import Check
    from ._nim_profiles import Match, Profile


def names_profile(model: NimModel) -> bool:
    """Whether a model names a profile of its image; ``default`` leaves the choice to NIM."""
    return bool(model.profile) and model.profile != "default"


def find_profile(model: NimModel, profiles: t.Sequence[Profile] | None) -> Match | None:
    """The profile that a model names, as far as it is known; None when it names none.

    Args:
        profiles: Of its image, or None.

    Raises:
        FleetError: ``no_such_profile``.
    """
    if not names_profile(model):
        return None
    # A model that comes from elsewhere may bring its manifest.
    return _find(model.name, str(model.profile), profiles if needs_download(model) else None)


def _find(model: str, profile: str, profiles: t.Sequence[Profile] | None) -> Match:
    # Here and below: only models that name their profile need what knows profiles, and each look loads all its code anew.
    from ._nim_profiles import match_profile

    try:
        return match_profile(profile, profiles)
    except FleetError as error:
        error.message = "Model %s: profile = %s" % (model, error.message)
        error.facts["model"] = model
        raise


def wish_of(
    model: NimModel, profiles: t.Sequence[Profile] | None, present: t.Sequence[str] = (), *, stays: bool = False
) -> Wish:
    """What a model asks for: as many GPUs as it says, else as many as its profile needs, else one.

    Args:
        present: UUIDs that its service has now.
        stays: Whether the service serves on them.
    """
    try:
        match = find_profile(model, profiles)
    except FleetError:
        # Told before the start; a service that runs is left alone.
        match = None
    profile = match.profile if match is not None else None
    memory, option = model.gpu_memory_mib, "gpu_memory"
    # What serves on its GPUs, or was given them by name, is judged before a start, by as many of them as the profile needs.
    counted = not stays and (model.gpus is None or isinstance(model.gpus, int))
    if counted and profile is not None and profile.memory_gb is not None and takes_profile_memory(model):
        from ._nim_profile_checks import memory_mib

        if memory_mib(profile.memory_gb) > (memory or 0):
            # A shorter context takes less.
            memory, option = memory_mib(profile.memory_gb), "max_model_length"
    gpus = model.gpus
    named = ""
    if gpus is None:
        gpus = (profile.gpus if profile is not None else None) or 1
        named = str(model.profile) if profile is not None and profile.gpus else ""
    return Wish(model.name, gpus, tuple(present), memory, named, stays, option)


def check_profile_of(
    model: NimModel,
    profiles: t.Sequence[Profile] | None,
    gpus: t.Sequence[Gpu],
    devices: t.Mapping[str, str],
    count: int | None = None,
) -> None:
    """Refuse a model whose profile is not in its image, or cannot run on the GPUs that it gets.

    Raises:
        FleetError: ``no_such_profile``, ``profile_unsuitable``.
    """
    if names_profile(model):
        check_named_profile(
            model.name,
            str(model.profile),
            profiles if needs_download(model) else None,
            gpus,
            devices,
            count=count,
            lora=model.lora_directory is not None,
            memory=takes_profile_memory(model),
        )


def check_named_profile(
    model: str,
    named: str,
    profiles: t.Sequence[Profile] | None,
    gpus: t.Sequence[Gpu],
    devices: t.Mapping[str, str],
    *,
    count: int | None = None,
    lora: bool = False,
    memory: bool = True,
) -> list[Check]:
    """Refuse a profile that is not in the image, or cannot run on these GPUs.

    Args:
        model: Name of the model.
        named: Id or description of the profile.
        profiles: Of the image; None when they are not known.
        gpus: Those that the model gets, or all of the host.
        devices: PCI device id by PCI address.
        count: How many of them it gets; None = as many as the profile needs.
        memory: Whether the model takes the memory that the profile's description names.

    Returns:
        The questions to which nobody knows the answer; none where nothing is known of the profile.

    Raises:
        FleetError: ``no_such_profile``, ``profile_unsuitable``.
    """
    profile = _find(model, named, profiles).profile
    if profile is None:
        return []
    if not memory:
        profile = replace(profile, memory_gb=None)
    if not profile.id and not profile.description:
        profile = replace(profile, description=named)
    from ._nim_profile_checks import require_profile

    return require_profile(model, profile, gpus, count=count, lora=lora, devices=devices)


def given_gpus(uuids: t.Sequence[str], gpus: t.Sequence[Gpu]) -> list[Gpu]:
    """GPUs by UUID; a MIG device is its GPU with the device's memory."""
    found = []
    for uuid in uuids:
        for gpu in gpus:
            if gpu.uuid == uuid:
                found.append(gpu)
            for device in gpu.mig_devices:
                if device.get("uuid") == uuid:
                    found.append(replace(gpu, uuid=uuid, memory_total_mib=device.get("memory_total_mib")))
    return found


def gpu_kinds(uuids: t.Sequence[str], gpus: t.Sequence[Gpu]) -> list[str]:
    """What NIM chooses a profile by, for each GPU, sorted: its name, and the memory of a MIG device.

    Memory of a whole GPU is left out, because drivers count it differently; one that is not known is of its own kind.
    """
    kinds = []
    for uuid in uuids:
        found = given_gpus([uuid], gpus)
        kind = (found[0].name if found else "") or uuid
        if found and not any(gpu.uuid == uuid for gpu in gpus):
            kind += " MIG %.0f GiB" % ((found[0].memory_total_mib or 0) / 1024)
        kinds.append(kind)
    return sorted(kinds)


def named_gpu(name: str, gpus: t.Sequence[Gpu]) -> Gpu | None:
    """The GPU of an index or UUID, or that a MIG device is part of; None where there is none."""
    for gpu in gpus:
        names = (gpu.index, gpu.uuid, *(device.get("uuid") for device in gpu.mig_devices))
        if name.lower() in (str(known).lower() for known in names):
            return gpu
    return None


def device_ids(inventory: GpuInventory) -> dict[str, str]:
    """PCI device id (four hexadecimal digits) by PCI address."""
    return {gpu.bdf: gpu.device_id for gpu in inventory.pci}


def requested_count(gpus: GpuRequest | None, there: int) -> int | None:
    """How many GPUs a request gives; None where that is left to the profile."""
    if gpus is None or isinstance(gpus, int):
        return gpus
    return there if gpus == "all" else len(gpus)


def gpus_of(host: Host, users: t.Sequence[ImageUser], gpus: t.Sequence[Gpu]) -> list[Gpu]:
    """GPUs that the models which run an image name or have; all of the host where that is not known of one of them."""
    found: t.Dict[str, Gpu] = {}
    for user in users:
        names = user.named or (wanted_gpus(host, user.model) if user.model else ())
        seen = [gpu for gpu in (named_gpu(name, gpus) for name in names) if gpu is not None]
        if not names or len(seen) != len(names) or user.gpus not in (None, len(names)):
            return list(gpus)
        found.update((gpu.uuid, gpu) for gpu in seen)
    return list(found.values()) or list(gpus)
