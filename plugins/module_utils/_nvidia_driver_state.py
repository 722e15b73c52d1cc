# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a look at a host finds of the NVIDIA driver, and where."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._driver_branches import OPEN, PROPRIETARY, branch_of_version
from ._errors import FleetError
from ._gpu_holders import Holder
from ._gpu_inventory import GpuInventory
from ._host import Host
from ._loaded_driver import ModuleFile, is_loaded, told_apart
from ._nvidia_driver_packages import Wish, user_space_version
from ._os_release import OsRelease
from ._packages import Package, PackageManager, RepositoryState
from ._systemd import unit_properties

PREFERENCES = "/etc/apt/preferences.d/gpu-fleet-nvidia-driver"
UNATTENDED = "/etc/apt/apt.conf.d/52gpu-fleet-nvidia"
#: The names of the packages that were locked here on EL, where nothing else tells these locks from the operator's.
LOCKED = "/var/lib/gpu_fleet/nvidia-driver-locks"
NON_FREE = "/etc/apt/sources.list.d/gpu-fleet-debian-non-free.sources"
#: Packages with headers that the distributions always have.
_ANY_HEADERS = {
    "debian": ("linux-headers-amd64", "linux-headers-arm64", "linux-headers-generic"),
    "rhel": ("kernel-devel",),
}
#: What the module says of its licence, and so of its flavour. Only of nvidia itself: nvidia-uvm is MIT/GPL in both.
_FLAVOURS = {"Dual MIT/GPL": OPEN, "NVIDIA": PROPRIETARY}


@dataclass(frozen=True)
class DriverState:
    """One look at everything the driver consists of.

    Attributes:
        installed: Packages by name: driver, dkms, headers.
        interrupted: Packages that an interrupted transaction left half installed.
        files: Path -> content of the files that are managed here; None when absent.
        repositories: Repository name -> what is configured of it; filled for the wanted repository only.
        components: Components of the distribution's own apt repository that are enabled.
        stream: Enabled module stream on EL, empty when none.
        on_disk: Module version for the running kernel, empty when there is none.
        secure_boot: Whether the firmware enforces signatures.
        key_enrolled: Whether the key that dkms signs with is enrolled.
        headers: Whether modules can be compiled for the running kernel.
        runfile: Whether NVIDIA's .run installer put a driver there.
        headers_offered: False when the package lists of the host know headers, but not those of the running kernel.
        later_headers: Metapackages with the headers of the kernels that upgrades bring; those that are missing and may be had.
        lists_silent: The package lists of the host know no headers at all, so that nobody knows whether those are on offer.
        dkms: What ``dkms status`` says, asked only while no module is there for the running kernel.
        disabled_units: Services of the driver that this hardware needs and that would not start at boot.
        masked_units: Those of them that somebody has masked.
        on_disk_flavour: Flavour of the module on the disk, empty when it does not say.
    """

    os: OsRelease
    machine: str
    kernel: str
    inventory: GpuInventory
    installed: t.Mapping[str, Package]
    interrupted: tuple[str, ...]
    files: t.Mapping[str, str | None]
    repositories: t.Mapping[str, RepositoryState]
    components: frozenset[str]
    stream: str
    on_disk: str
    secure_boot: bool
    key_enrolled: bool
    headers: bool
    nouveau_loaded: bool
    runfile: bool
    holders: tuple[Holder, ...]
    headers_offered: bool = True
    later_headers: tuple[str, ...] = ()
    lists_silent: bool = False
    dkms: str = ""
    disabled_units: tuple[str, ...] = ()
    masked_units: tuple[str, ...] = ()
    on_disk_flavour: str = ""

    @property
    def current(self) -> bool:
        """Whether the module in memory is the one on the disk."""
        return is_loaded(self.inventory.driver, ModuleFile(self.on_disk, self.on_disk_flavour))

    @property
    def modules(self) -> tuple[str, str]:
        """The module in memory and the one on the disk, in words."""
        return told_apart(self.inventory.driver, ModuleFile(self.on_disk, self.on_disk_flavour))

    @property
    def loaded_version(self) -> str:
        return self.inventory.driver.version if self.inventory.driver else ""

    @property
    def user_space(self) -> str:
        return user_space_version(self.installed)


def _field(text: str, name: str) -> str:
    found = re.search(r"^%s:[ \t]*(.*)$" % name, text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def module_on_disk(host: Host, kernel: str) -> ModuleFile:
    """The module file for a kernel; Debian's own packages call it nvidia-current."""
    for name in ("nvidia", "nvidia-current", "nvidia-current-open"):
        # Everything that it says: of several -F only the last counts, and every look would ask twice.
        result = host.run(["modinfo", "-k", kernel, name], timeout=30)
        version = _field(result.stdout, "version")
        if result.ok and branch_of_version(version):
            return ModuleFile(version, _FLAVOURS.get(_field(result.stdout, "license"), ""))
    return ModuleFile()


def on_disk_version(host: Host, kernel: str) -> str:
    """Version of the module file for a kernel, empty when there is none."""
    return module_on_disk(host, kernel).version


def boot_states(host: Host, wish: Wish) -> dict[str, str]:
    """Whether the services that the wish needs start at boot: enabled, disabled, masked, …; empty without such a unit."""
    units = []
    if wish.fabric_manager:
        units.append("nvidia-fabricmanager.service")
    if wish.persistenced:
        units.append("nvidia-persistenced.service")
    return {unit: unit_properties(host, unit, "UnitFileState").get("UnitFileState", "") for unit in units}


def headers_offered(manager: PackageManager, package: str) -> bool:
    """Whether the lists on the host have a package with headers; yes when they say nothing about headers at all."""
    return bool(headers_on_offer(manager, [package])[0])


def headers_on_offer(manager: PackageManager, names: t.Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Those of some packages with headers that may be had, and whether that is unknown, as for :func:`headers_offered`."""
    if not names:
        return (), False
    offers = manager.available(*names)
    silent = not offers and not manager.available(*_ANY_HEADERS[manager.family])
    return tuple(name for name in names if silent or offers.get(name)), silent


def headers_unavailable(kernel: str, cause: str, facts: t.Mapping[str, t.Any] | None = None) -> FleetError:
    return FleetError(
        "kernel_headers_unavailable",
        "The headers of the running kernel %s cannot be installed (%s) and without them no kernel module can be "
        "built; boot a kernel whose headers are on offer (usually the newest installed one: upgrade and reboot), "
        "or set nvidia_driver_kernel_headers to false when they come from elsewhere." % (kernel, cause),
        **(facts or {}),
    )
