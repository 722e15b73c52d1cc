# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Whether the loaded NVIDIA kernel module must be swapped for the one on disk, and what stands in the way."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._driver_clients import UNLOAD_ORDER, foreign_holders, idle_daemons, in_use_error, in_use_message, read_record
from ._errors import FleetError
from ._gpu_holders import Holder, driver_holders
from ._gpu_inventory import GpuInventory, observe_gpus
from ._host import Host
from ._loaded_driver import LoadedDriver, ModuleFile, flavours_differ, is_loaded, loaded_modules, told_apart
from ._nvidia_driver_packages import QUERY_PATTERNS, user_space_version
from ._nvidia_driver_state import module_on_disk
from ._nvlink_fabric import FABRIC_TIMEOUT, joining
from ._os_release import read_os_release
from ._own_state import read_own_state
from ._packages import package_manager
from ._resource import Change, Disruption, Planner

#: Written before a reboot so that a target version causes one reboot at most.
REBOOT_MARKER = "/var/lib/gpu_fleet/driver-reboot.json"


@dataclass(frozen=True)
class ReloadState:
    """What decides whether and how the module is swapped.

    Attributes:
        on_disk: Version of the module for the running kernel, empty when there is none.
        on_disk_flavour: Its flavour, empty when it does not say.
        user_space: Version of the libraries by the package database, empty when not installed by packages.
        stopped_units: Units that an earlier step stopped and nobody has started again.
        idle_units: Daemons of the driver that are enabled but do not run although the module is loaded.
        gpu_processes: Processes that hold the driver, the driver's own clients left out.
        marker: Content of the reboot marker, None without one.
        boot_id: Changes with every boot.
        fabric: What GPUs say that are just joining the NVLink fabric; empty otherwise.
    """

    inventory: GpuInventory
    loaded: LoadedDriver | None
    on_disk: str
    user_space: str
    kernel: str
    nouveau_loaded: bool
    modules: frozenset[str]
    stopped_units: tuple[str, ...]
    idle_units: tuple[str, ...]
    gpu_processes: tuple[Holder, ...]
    marker: dict[str, t.Any] | None
    boot_id: str
    fabric: str = ""
    on_disk_flavour: str = ""

    @property
    def current(self) -> bool:
        """Whether the module in memory is the one on the disk."""
        return is_loaded(self.loaded, ModuleFile(self.on_disk, self.on_disk_flavour))

    @property
    def other_flavour(self) -> bool:
        """Whether the module in memory is known to be of the other flavour than the one on the disk."""
        return self.loaded is not None and flavours_differ(self.loaded.flavour, self.on_disk_flavour)

    @property
    def words(self) -> tuple[str, str]:
        """The module in memory and the one on the disk, in words."""
        return told_apart(self.loaded, ModuleFile(self.on_disk, self.on_disk_flavour))

    @property
    def loaded_version(self) -> str:
        return self.loaded.version if self.loaded else ""


def read_marker(host: Host) -> dict[str, t.Any] | None:
    """The record of the last reboot for a driver.

    Raises:
        FleetError: ``state_unreadable`` when somebody broke the file: it is reported and left as it is.
    """
    remedy = (
        "it tells whether this host was already rebooted for its driver, and without it a reboot may come once more"
    )
    return read_own_state(host, REBOOT_MARKER, {"target": str, "boot_id": str}, remedy)


def observe_reload(host: Host) -> ReloadState:
    """Everything a reload depends on; changes nothing."""
    inventory = observe_gpus(host, with_smi=False)
    loaded = inventory.driver
    kernel = host.kernel_release()
    modules = loaded_modules(host)
    user_space = ""
    module = ModuleFile()
    if inventory.pci:
        manager = package_manager(host, read_os_release(host))
        user_space = user_space_version(manager.installed(*QUERY_PATTERNS))
        module = module_on_disk(host, kernel)
    return ReloadState(
        inventory=inventory,
        loaded=loaded,
        on_disk=module.version,
        on_disk_flavour=module.flavour,
        user_space=user_space,
        kernel=kernel,
        nouveau_loaded="nouveau" in modules,
        modules=frozenset(modules & set(UNLOAD_ORDER)),
        stopped_units=read_record(host),
        idle_units=tuple(idle_daemons(host)) if loaded else (),
        gpu_processes=foreign_holders(driver_holders(host)) if loaded else (),
        marker=read_marker(host),
        boot_id=(host.read_text("/proc/sys/kernel/random/boot_id") or "").strip(),
        fabric=joining(host, inventory),
    )


class ReloadPlanner(Planner[ReloadState]):
    """Loaded module = module on disk, with the services of the driver running as before.

    Args:
        prepare_reboot: Write the reboot marker instead of reloading; fails when the host was already rebooted for
            the same driver version.
        always: With ``prepare_reboot``, also where the driver is loaded.
        expected_version: Version or branch that the driver must have in the end; empty for what is on disk.
    """

    name = "nvidia_driver_reload"

    def __init__(
        self,
        *,
        prepare_reboot: bool = False,
        always: bool = False,
        expected_version: str = "",
        reboot_reason: str = "",
    ) -> None:
        if expected_version and not re.fullmatch(r"\d{3}(\.\d+){0,2}", expected_version):
            raise FleetError(
                "invalid_option",
                "expected_version = %r: not a driver branch or version; write it like 580 or 580.95.05."
                % expected_version,
            )
        self.prepare_reboot = prepare_reboot
        self.always = always
        self.expected_version = expected_version
        self.given_reason = reboot_reason
        #: Found out only by trying; the second look then knows.
        self.tried: str = ""
        #: What the GPUs still said of the NVLink fabric when it had been waited for.
        self.fabric_left: str | None = None

    def observe(self, host: Host) -> ReloadState:
        return observe_reload(host)

    def _mismatch(self, state: ReloadState) -> FleetError | None:
        """Package trouble that neither a reload nor a reboot mends."""
        if not state.on_disk:
            return FleetError(
                "no_kernel_module",
                "There is no NVIDIA kernel module for the running kernel %s; look at `dkms status` and install the "
                "kernel headers (role nvidia_driver does both)." % state.kernel,
            )
        if state.user_space and state.user_space != state.on_disk:
            return FleetError(
                "driver_mismatch",
                "The module on disk is %s but the user-space driver is %s; run the nvidia_driver role so that all "
                "parts have one version." % (state.on_disk, state.user_space),
            )
        expected = self.expected_version
        if expected and not (state.on_disk == expected or state.on_disk.startswith(expected + ".")):
            return FleetError(
                "driver_mismatch",
                "The driver on disk is %s but %s is wanted; run the nvidia_driver role first."
                % (state.on_disk, expected),
            )
        return None

    def reboot_reason(self, state: ReloadState) -> str:
        """Why only a reboot can bring the wanted module into the kernel; empty when a reload can (or nothing is due)."""
        if state.current:
            return ""
        return self.tried or self.stuck(state)

    @staticmethod
    def stuck(state: ReloadState) -> str:
        """Why the loaded module, whichever it is, leaves the kernel only with a reboot; empty when that can be tried."""
        if state.loaded is not None and not state.loaded.can_unload:
            return "the running kernel %s was built without module unloading" % state.kernel
        return ""

    def plan(self, state: ReloadState) -> list[Change]:
        if not state.inventory.pci:
            return []
        problem = self._mismatch(state)
        if problem is not None:
            raise problem
        changes: list[Change] = []
        current = state.current
        if self.prepare_reboot:
            return [] if current and not self.always else self._plan_marker(state)
        if not current:
            reason = self.reboot_reason(state)
            blocked = "a reboot is needed: %s" % reason if reason else None
            loaded, on_disk = state.words
            if state.loaded is not None and state.gpu_processes:
                blocked = in_use_message(state.gpu_processes, "Reloading the driver")
            changes.append(
                Change(
                    self.name,
                    "kernel module nvidia",
                    loaded or None,
                    on_disk,
                    "the module in memory is not the one that is installed" if state.loaded else "no module is loaded",
                    disruption=Disruption.REBOOT
                    if reason
                    else (Disruption.UNLOAD_DRIVER if state.loaded else Disruption.NONE),
                    action="reload",
                    blocked=blocked,
                )
            )
        elif state.stopped_units or state.idle_units:
            units = [
                *state.idle_units,
                *reversed([unit for unit in state.stopped_units if unit not in state.idle_units]),
            ]
            changes.append(
                Change(
                    self.name,
                    "services of the driver",
                    "stopped",
                    ", ".join(units),
                    "they were stopped for a reload and not started again"
                    if state.stopped_units
                    else "they are enabled but do not run",
                    action="start_clients",
                )
            )
        elif state.fabric and self.fabric_left is None:
            changes.append(
                Change(
                    self.name,
                    "NVLink fabric",
                    state.fabric,
                    "Completed",
                    "the GPUs are just joining it, and compute only after that",
                    action="fabric",
                )
            )
        if current and state.marker is not None:
            changes.append(
                Change(
                    self.name,
                    REBOOT_MARKER,
                    str(state.marker.get("target", "")),
                    None,
                    "the driver that the host was rebooted for is loaded",
                    action="clear_marker",
                )
            )
        return changes

    def _plan_marker(self, state: ReloadState) -> list[Change]:
        if state.gpu_processes:
            raise in_use_error(state.gpu_processes, "Rebooting")
        marker = state.marker or {}
        if marker.get("target") == state.on_disk:
            if marker.get("boot_id") != state.boot_id:
                loaded, on_disk = state.words
                raise FleetError(
                    "rebooted_once",
                    "This host was already rebooted once for driver %s (reason: %s), yet %s is loaded; it is not "
                    "rebooted again. Find out why the module does not load (journalctl -k), then remove %s."
                    % (
                        on_disk,
                        marker.get("reason", "unknown"),
                        loaded or "no driver",
                        REBOOT_MARKER,
                    ),
                    marker=marker,
                )
            # Written, but the reboot never came: it is still allowed.
            return []
        return [
            Change(
                self.name,
                REBOOT_MARKER,
                marker.get("target"),
                state.on_disk,
                "a target version causes one reboot at most",
                disruption=Disruption.REBOOT,
                action="write_marker",
                data={"target": state.on_disk, "boot_id": state.boot_id, "from": state.loaded_version},
            )
        ]

    # -- answer

    def result(self, state: ReloadState) -> dict[str, t.Any]:
        """Return values of the module.

        Raises:
            FleetError: ``gpu_in_use`` when the module must change and somebody uses a GPU (in check mode too).
        """
        answer: dict[str, t.Any] = {
            "loaded": state.loaded_version,
            "on_disk": state.on_disk,
            "user_space": state.user_space,
            "flavour": state.loaded.flavour if state.loaded else "",
            "reboot_required": False,
            "reboot_reason": "",
            "holders": [holder.as_dict() for holder in state.gpu_processes],
        }
        if not state.inventory.pci:
            answer["message"] = "This host has no NVIDIA GPU; nothing was done."
            return answer
        if state.current:
            answer["message"] = "Driver %s: loaded = on disk = user space." % state.on_disk
            if self.fabric_left:
                answer["warnings"] = [
                    "After %d seconds the NVLink fabric is %s instead of Completed; no service is started on a GPU that has "
                    "not joined it. Look at 'journalctl -u nvidia-fabricmanager', whose version must equal the driver's."
                    % (FABRIC_TIMEOUT, self.fabric_left)
                ]
            return answer
        reason = self.reboot_reason(state)
        loaded, on_disk = state.words
        if state.gpu_processes and state.loaded is not None:
            # A reboot takes the GPU away just the same.
            raise in_use_error(state.gpu_processes, "Reloading the driver")
        if reason:
            answer["reboot_required"] = True
            answer["reboot_reason"] = reason
            answer["message"] = "Driver %s is installed but %s: a reboot is needed because %s." % (
                on_disk,
                "%s is loaded" % loaded if state.loaded else "not loaded",
                reason,
            )
            answer["warnings"] = [answer["message"]]
        else:
            answer["message"] = "Driver %s is installed but %s is loaded." % (
                on_disk,
                loaded or "no driver",
            )
        return answer
