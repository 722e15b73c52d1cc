# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The GPUs that a NIM service was given, and how full they are."""

from __future__ import annotations

import typing as t

from ._gpu_inventory import observe_gpus
from ._host import Host
from ._nim_paths import configuration_path
from ._untrusted import json_object

Json = t.Dict[str, t.Any]


def gpus_of_services(host: Host, names: t.Sequence[str]) -> dict[str, list[Json]]:
    """``index``, ``uuid``, ``memory_used_mib`` and ``memory_total_mib`` of each GPU or MIG device of each service.

    A value that the driver does not tell (unified memory, a GPU that is gone) is None.
    """
    given: dict[str, list[str]] = {}
    for name in names:
        found = json_object(host.read_text(configuration_path(name))).get("gpus")
        given[name] = [uuid for uuid in found if isinstance(uuid, str)] if isinstance(found, list) else []
    if not any(given.values()):
        return {name: [] for name in names}
    known: dict[str, Json] = {}
    for gpu in observe_gpus(host).gpus:
        known[gpu.uuid.lower()] = _entry(gpu.index, gpu.uuid, gpu.memory_used_mib, gpu.memory_total_mib)
        for device in gpu.mig_devices:
            uuid = str(device.get("uuid") or "")
            known[uuid.lower()] = _entry(gpu.index, uuid, device["memory_used_mib"], device["memory_total_mib"])
    return {
        name: [known.get(uuid.lower()) or _entry(None, uuid, None, None) for uuid in uuids]
        for name, uuids in given.items()
    }


def _entry(index: int | None, uuid: str, used: int | None, total: int | None) -> Json:
    return {"index": index, "uuid": uuid, "memory_used_mib": used, "memory_total_mib": total}
