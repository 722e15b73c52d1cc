# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""One look at a whole host, put together from sections.

A section is a function that takes a :class:`Look` and returns top-level keys of the answer. Sections share what they
read through the Look, so that nothing is read twice; a section that fails costs only its own keys.
"""

from __future__ import annotations

import dataclasses
import functools
import typing as t

from . import _host_services
from ._docker_api import DockerApi
from ._driver_clients import is_client
from ._errors import FleetError
from ._gpu_holders import driver_holders
from ._gpu_inventory import GpuInventory, observe_gpus
from ._host import Host
from ._loaded_driver import loaded_modules
from ._nouveau import BLACKLIST
from ._nvidia_driver_packages import QUERY_PATTERNS, to_hold, user_space_version
from ._nvidia_driver_state import on_disk_version
from ._os_release import OsRelease, read_os_release
from ._packages import Package, package_manager
from ._secure_boot import secure_boot_enabled


class Look:
    """A host with everything that was already read of it."""

    def __init__(self, host: Host, api: DockerApi | None = None) -> None:
        self.host = host
        self.api = api or DockerApi()

    @functools.cached_property
    def os(self) -> OsRelease:
        return read_os_release(self.host)

    @functools.cached_property
    def inventory(self) -> GpuInventory:
        return observe_gpus(self.host)

    @functools.cached_property
    def packages(self) -> t.Mapping[str, Package]:
        """Installed driver packages; empty where the package tool is unknown."""
        try:
            return package_manager(self.host, self.os).installed(*QUERY_PATTERNS)
        except FleetError:
            return {}


def _system(look: Look) -> dict[str, t.Any]:
    release = look.os
    return {
        "os": {"id": release.id, "version": release.version_id, "family": release.family, "name": release.pretty},
        "kernel": look.host.kernel_release(),
        "machine": look.host.machine(),
        "secure_boot": secure_boot_enabled(look.host),
    }


def _pci(look: Look) -> dict[str, t.Any]:
    return {
        "pci_gpus": [dataclasses.asdict(gpu) for gpu in look.inventory.pci],
        "nouveau": {
            "loaded": "nouveau" in loaded_modules(look.host),
            "blacklisted": look.host.exists(BLACKLIST),
        },
    }


def _driver(look: Look) -> dict[str, t.Any]:
    loaded = look.inventory.driver
    dkms: list[str] = []
    if look.host.which("dkms"):
        dkms = look.host.run(["dkms", "status"], timeout=60).stdout.strip().splitlines()
    return {
        "driver": {
            "loaded": loaded.version if loaded else "",
            "flavour": loaded.flavour if loaded else "",
            "can_unload": loaded.can_unload if loaded else False,
            "on_disk": on_disk_version(look.host, look.host.kernel_release()),
            "user_space": user_space_version(look.packages) or look.inventory.smi_driver_version,
            "dkms": [line for line in dkms if line.startswith("nvidia")],
            "packages": {name: look.packages[name].version for name in to_hold(look.packages)},
            "held": all(look.packages[name].held for name in to_hold(look.packages)),
        }
    }


def _gpus(look: Look) -> dict[str, t.Any]:
    inventory = look.inventory
    answer: dict[str, t.Any] = {
        "gpus": [dataclasses.asdict(gpu) for gpu in inventory.gpus],
        "cuda_version": inventory.cuda_version,
        "fabric": {
            "nvswitches": inventory.nvswitches,
            "nvlink5": inventory.nvlink5,
            "manager_needed": inventory.needs_fabric_manager,
            "states": list(inventory.fabric_states),
        },
        "mig": {
            "enabled": any(gpu.mig == "Enabled" for gpu in inventory.gpus),
            "devices": {gpu.uuid: list(gpu.mig_devices) for gpu in inventory.gpus if gpu.mig_devices},
        },
    }
    if inventory.smi_error:
        answer["errors"] = {"nvidia-smi": inventory.smi_error}
    return answer


def _holders(look: Look) -> dict[str, t.Any]:
    # Without GPUs there are no device files to hold.
    found = driver_holders(look.host) if look.inventory.pci else []
    return {"holders": [dict(holder.as_dict(), driver_service=is_client(holder)) for holder in found]}


def _docker(look: Look) -> dict[str, t.Any]:
    return {"docker": _host_services.engine(look.host, look.api)}


def _toolkit(look: Look) -> dict[str, t.Any]:
    return {"container_toolkit": _host_services.toolkit(look.host, look.os)}


def _space(look: Look) -> dict[str, t.Any]:
    return {"free_bytes": _host_services.space(look.host)}


def _ports(look: Look) -> dict[str, t.Any]:
    return {"ports": _host_services.ports(look.host)}


def _nim(look: Look) -> dict[str, t.Any]:
    return {"nim": _host_services.services(look.host, look.api)}


#: Order of the answer. Each observer of another resource can add its own section here.
SECTIONS: list[tuple[str, t.Callable[[Look], dict[str, t.Any]]]] = [
    ("system", _system),
    ("pci", _pci),
    ("driver", _driver),
    ("gpus", _gpus),
    ("holders", _holders),
    ("docker", _docker),
    ("container_toolkit", _toolkit),
    ("space", _space),
    ("ports", _ports),
    ("nim", _nim),
]


def gather(host: Host, wanted: t.Collection[str] = (), api: DockerApi | None = None) -> dict[str, t.Any]:
    """The answer of all sections (or of those wanted), with the causes of failed ones under ``errors``."""
    look = Look(host, api)
    answer: dict[str, t.Any] = {}
    errors: dict[str, str] = {}
    for name, section in SECTIONS:
        if wanted and name not in wanted:
            continue
        try:
            found = section(look)
        except FleetError as error:
            errors[name] = error.message
            continue
        errors.update(found.pop("errors", {}))
        answer.update(found)
    answer["errors"] = errors
    return answer
