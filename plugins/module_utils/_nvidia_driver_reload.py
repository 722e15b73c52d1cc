# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Swap the loaded NVIDIA kernel module for the one on disk without a reboot, or say exactly why that cannot be done."""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass

from ._driver_branches import branch_of_version
from ._errors import FleetError
from ._gpu import (
    GpuInventory,
    Holder,
    LoadedDriver,
    driver_holders,
    loaded_modules,
    observe_gpus,
    observe_loaded_driver,
    parse_smi,
)
from ._host import Host
from ._nvidia_driver_packages import QUERY_PATTERNS, user_space_version
from ._os_release import read_os_release
from ._packages import package_manager
from ._resource import Change, Disruption, Resource
from ._systemd import unit_properties
from ._untrusted import json_object, parse_json, strings

#: The driver's own clients in the order in which they are stopped; they start again in the reverse order.
CLIENT_UNITS = (
    # First: it watches modules.dep and would load the new module in the middle of everything.
    "nvidia-cdi-refresh.path",
    "nvidia-cdi-refresh.service",
    "nvidia-dcgm-exporter.service",
    "dcgm-exporter.service",
    "nvsm.service",
    "nvidia-dcgm.service",
    "dcgm.service",
    "nvidia-imex.service",
    "nvidia-fabricmanager.service",
    "nvidia-gridd.service",
    "nvidia-topologyd.service",
    "nvidia-persistenced.service",
)
#: Those that run all the time once the module is loaded; the others run when their owner wants.
DAEMONS = ("nvidia-persistenced.service", "nvidia-fabricmanager.service")
#: Kernel modules in the order in which they can be unloaded.
UNLOAD_ORDER = (
    "nvidia_drm",
    "nvidia_modeset",
    "nvidia_uvm",
    "nvidia_peermem",
    "nvidia_fs",
    "nvidia_vgpu_vfio",
    "gdrdrv",
    "nvidia",
)
#: Units that were stopped and must be started again. In /run: after a reboot enabled units start by themselves.
RECORD = "/run/gpu_fleet/driver-clients.json"
#: Written before a reboot so that a target version causes one reboot at most.
REBOOT_MARKER = "/var/lib/gpu_fleet/driver-reboot.json"

_STOP_TIMEOUT = 90.0  # seconds for one systemctl call
_LOAD_TIMEOUT = 180.0  # seconds; eight GPUs take half a minute
_FABRIC_TIMEOUT = 120.0  # seconds until Fabric Manager must have trained all links
_FABRIC_POLL = 2.0  # seconds

_KEY_SIGNS = ("Key was rejected by service", "Required key not available", "key was rejected")


@dataclass(frozen=True)
class ReloadState:
    """What decides whether and how the module is swapped.

    Attributes:
        on_disk: Version of the module for the running kernel, empty when there is none.
        user_space: Version of the libraries by the package database, empty when not installed by packages.
        stopped_units: Units that an earlier step stopped and nobody has started again.
        idle_units: Daemons of the driver that are enabled but do not run although the module is loaded.
        gpu_processes: Processes that hold the driver, the driver's own clients left out.
        marker: Content of the reboot marker, None without one.
        boot_id: Changes with every boot.
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

    @property
    def loaded_version(self) -> str:
        return self.loaded.version if self.loaded else ""


# -- looks ----------------------------------------------------------------------------------------


def on_disk_version(host: Host, kernel: str) -> str:
    """Version of the module file for a kernel; Debian's own packages call it nvidia-current."""
    for name in ("nvidia", "nvidia-current", "nvidia-current-open"):
        result = host.run(["modinfo", "-k", kernel, "-F", "version", name], timeout=30)
        version = result.stdout.strip().split("\n")[0].strip()
        if result.ok and branch_of_version(version):
            return version
    return ""


def is_client(holder: Holder) -> bool:
    """Whether a holder is one of the driver's own services, which may be stopped for a while."""
    return holder.unit in CLIENT_UNITS and not holder.container_id


def foreign_holders(holders: t.Iterable[Holder]) -> tuple[Holder, ...]:
    """Processes that use a GPU and that nothing here may stop."""
    return tuple(holder for holder in holders if not is_client(holder))


def in_use_message(holders: t.Sequence[Holder], doing: str) -> str:
    """One sentence that names everybody who uses the GPUs."""
    shown = ["%s" % holder.describe() for holder in holders[:8]]
    if len(holders) > 8:
        shown.append("%d more" % (len(holders) - 8))
    # A docker stop of a container that a unit keeps up would be undone.
    own = {re.sub(r"-download\Z", "", holder.container) for holder in holders if holder.container.startswith("nim-")}
    return "%s would take the GPU away from %s. Nothing was changed; stop %s%s and run again." % (
        doing,
        "; ".join(shown),
        "it" if len(holders) == 1 else "them",
        " (systemctl stop %s)" % " ".join(sorted(own)) if own else "",
    )


def in_use_error(holders: t.Sequence[Holder], doing: str) -> FleetError:
    return FleetError("gpu_in_use", in_use_message(holders, doing), holders=[holder.as_dict() for holder in holders])


def read_record(host: Host) -> tuple[str, ...]:
    """Units that a reload stopped and has not started again."""
    return tuple(unit for unit in strings(json_object(host.read_text(RECORD)).get("units")) if unit in CLIENT_UNITS)


def read_marker(host: Host) -> dict[str, t.Any] | None:
    """The record of the last reboot for a driver.

    Raises:
        FleetError: ``state_unreadable`` when somebody broke the file: it is reported and left as it is.
    """
    text = host.read_text(REBOOT_MARKER)
    if text is None:
        return None
    try:
        marker = parse_json(text)
    except ValueError as error:
        raise FleetError(
            "state_unreadable",
            "%s is not valid JSON (%s), so it is unknown whether this host was already rebooted for its driver; "
            "look at it and remove it." % (REBOOT_MARKER, error),
        ) from error
    if not isinstance(marker, dict):
        raise FleetError(
            "state_unreadable",
            "%s does not hold a JSON object, so it is unknown whether this host was already rebooted for its driver; "
            "look at it and remove it." % REBOOT_MARKER,
        )
    return marker


def observe_reload(host: Host) -> ReloadState:
    """Everything a reload depends on; changes nothing."""
    inventory = observe_gpus(host, with_smi=False)
    loaded = inventory.driver
    kernel = host.kernel_release()
    modules = loaded_modules(host)
    user_space = ""
    on_disk = ""
    if inventory.pci:
        manager = package_manager(host, read_os_release(host))
        user_space = user_space_version(manager.installed(*QUERY_PATTERNS))
        on_disk = on_disk_version(host, kernel)
    return ReloadState(
        inventory=inventory,
        loaded=loaded,
        on_disk=on_disk,
        user_space=user_space,
        kernel=kernel,
        nouveau_loaded="nouveau" in modules,
        modules=frozenset(modules & set(UNLOAD_ORDER)),
        stopped_units=read_record(host),
        idle_units=tuple(idle_daemons(host)) if loaded else (),
        gpu_processes=foreign_holders(driver_holders(host)) if loaded else (),
        marker=read_marker(host),
        boot_id=(host.read_text("/proc/sys/kernel/random/boot_id") or "").strip(),
    )


# -- steps, shared with the package swap ----------------------------------------------------------


def active_units(host: Host, units: t.Sequence[str] = CLIENT_UNITS) -> list[str]:
    """Those of the units that run now (or wait, for a path unit), in the given order."""
    result = host.run(["systemctl", "is-active", *units], timeout=_STOP_TIMEOUT)
    states = result.stdout.split()
    if len(states) != len(units):
        return []
    return [unit for unit, state in zip(units, states) if state in ("active", "activating", "reloading")]


def idle_daemons(host: Host) -> list[str]:
    """Daemons that are enabled and do not run, in the order in which they start."""
    idle = []
    for unit in DAEMONS:
        values = unit_properties(host, unit, "ActiveState", "UnitFileState")
        if values.get("UnitFileState") == "enabled" and values.get("ActiveState") not in ("active", "activating"):
            idle.append(unit)
    return idle


def stop_clients(host: Host) -> list[str]:
    """Stop the driver's own services, and record on the host which ones, before the first is stopped.

    Raises:
        FleetError: ``client_not_stopped``; what was stopped has then been started again.
    """
    already = list(read_record(host))
    running = active_units(host)
    units = [unit for unit in CLIENT_UNITS if unit in running or unit in already]
    if units:
        host.make_dir("/run/gpu_fleet", mode=0o755)
        host.write_file(RECORD, json.dumps({"units": units}) + "\n", mode=0o644)
    for unit in running:
        result = host.run(["systemctl", "stop", unit], timeout=_STOP_TIMEOUT)
        if not result.ok:
            start_clients(host)
            raise FleetError(
                "client_not_stopped",
                "Stopping %s, which uses the driver, failed: %s. The driver was left loaded; stop the unit by hand "
                "and run again." % (unit, result.last_line().rstrip(".")),
            )
    return units


def start_clients(host: Host) -> list[str]:
    """Start exactly the services that were stopped, in reverse order; the record goes when all of them run.

    Raises:
        FleetError: ``client_not_started`` with the unit's own words.
    """
    units = read_record(host)
    for unit in [*(unit for unit in idle_daemons(host) if unit not in units), *reversed(units)]:
        if unit == "nvidia-cdi-refresh.service" or unit in DAEMONS:
            # Earlier failures, while no module was loaded, would block the next start.
            host.run(["systemctl", "reset-failed", unit], timeout=_STOP_TIMEOUT)
        result = host.run(["systemctl", "start", unit], timeout=_STOP_TIMEOUT)
        if not result.ok:
            journal = host.run(["journalctl", "-u", unit, "-n", "5", "--no-pager", "-o", "cat"], timeout=30)
            raise FleetError(
                "client_not_started",
                "The driver is loaded, but %s, which ran before, does not start: %s. Its last words: %s"
                % (
                    unit,
                    result.last_line().rstrip("."),
                    " / ".join(journal.stdout.split("\n")[-4:]).strip(" /") or "none",
                ),
            )
    if units:
        host.remove(RECORD)
    return list(units)


def unload_modules(host: Host) -> str:
    """Take the driver out of the kernel.

    Returns:
        Why it is still there, or an empty string. Modules that were taken out before a failure are put back.
    """
    loaded = observe_loaded_driver(host)
    if loaded is None:
        return ""
    if not loaded.can_unload:
        return "the running kernel %s was built without module unloading" % host.kernel_release()
    present = loaded_modules(host)
    removed: list[str] = []
    for name in UNLOAD_ORDER:
        if name not in present:
            continue
        result = host.run(["rmmod", name], timeout=_LOAD_TIMEOUT)
        if not result.ok:
            count = (host.read_text("/sys/module/%s/refcnt" % name) or "").strip()
            users = ", ".join(host.list_dir("/sys/module/%s/holders" % name))
            for earlier in reversed(removed):
                host.run(["modprobe", earlier], timeout=_LOAD_TIMEOUT)
            if users:
                return "kernel module %s cannot be unloaded, the modules %s use it" % (name, users)
            if name in ("nvidia_drm", "nvidia_modeset") and count not in ("", "0"):
                return (
                    "kernel module %s is in use (%s users) by no process: the console runs on the GPU's frame buffer"
                    % (name, count)
                )
            return "kernel module %s cannot be unloaded: %s" % (name, result.last_line().rstrip("."))
        removed.append(name)
    return ""


def load_failure(host: Host, kernel: str, said: str) -> tuple[str, bool]:
    """Why the kernel did not take the module, in words, and whether a reboot can change that (from the kernel log)."""
    log = host.run(["journalctl", "-k", "-b", "-n", "200", "--no-pager", "-o", "cat"], timeout=30).stdout
    text = said + "\n" + log
    if any(sign in text for sign in _KEY_SIGNS):
        return (
            "Secure Boot is on and the kernel rejected the module's signature: enrol the key that signed it "
            "(mokutil --import /var/lib/dkms/mok.pub, then confirm at the console during the next boot)",
            True,
        )
    if "not supported by open nvidia.ko" in text or "does not include the required GPU" in text:
        return "the GPU does not work with the open kernel modules: set nvidia_driver_flavour to proprietary", False
    if "requires use of the NVIDIA open kernel modules" in text:
        return "the GPU works with the open kernel modules only: set nvidia_driver_flavour to open", False
    if "not found in directory" in said:
        return "there is no module for the running kernel %s" % kernel, True
    if "No such device" in said:
        lines = [line for line in log.splitlines() if line.startswith("NVRM")]
        return "no GPU answered the driver%s" % (": " + lines[-1] if lines else ""), True
    return said.strip().rstrip("."), True


# -- the resource ---------------------------------------------------------------------------------


class DriverReload(Resource[ReloadState]):
    """Loaded module = module on disk, with the services of the driver running as before.

    Args:
        prepare_reboot: Write the reboot marker instead of reloading; fails when the host was already rebooted for
            the same driver version.
        expected_version: Version or branch that the driver must have in the end; empty for what is on disk.
    """

    name = "nvidia_driver_reload"

    def __init__(self, *, prepare_reboot: bool = False, expected_version: str = "", reboot_reason: str = "") -> None:
        if expected_version and not re.fullmatch(r"\d{3}(\.\d+){0,2}", expected_version):
            raise FleetError(
                "invalid_option",
                "expected_version = %r: not a driver branch or version; write it like 580 or 580.95.05."
                % expected_version,
            )
        self.prepare_reboot = prepare_reboot
        self.expected_version = expected_version
        self.given_reason = reboot_reason
        #: Found out only by trying; the second look then knows.
        self.tried: str = ""

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
        if state.loaded_version == state.on_disk:
            return ""
        if self.tried:
            return self.tried
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
        current = state.loaded_version == state.on_disk
        if self.prepare_reboot:
            return [] if current else self._plan_marker(state)
        if not current:
            reason = self.reboot_reason(state)
            blocked = "a reboot is needed: %s" % reason if reason else None
            if state.loaded is not None and state.gpu_processes:
                blocked = in_use_message(state.gpu_processes, "Reloading the driver")
            changes.append(
                Change(
                    self.name,
                    "kernel module nvidia",
                    state.loaded_version or None,
                    state.on_disk,
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
                raise FleetError(
                    "rebooted_once",
                    "This host was already rebooted once for driver %s (reason: %s), yet %s is loaded; it is not "
                    "rebooted again. Find out why the module does not load (journalctl -k), then remove %s."
                    % (
                        state.on_disk,
                        marker.get("reason", "unknown"),
                        state.loaded_version or "no driver",
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

    # -- changes

    def apply(self, host: Host, change: Change) -> None:
        if change.action == "write_marker":
            record = dict(change.data, reason=self.given_reason, time=int(host.time()))
            host.make_dir("/var/lib/gpu_fleet", mode=0o755)
            host.write_file(REBOOT_MARKER, json.dumps(record, sort_keys=True) + "\n", mode=0o644)
        elif change.action == "clear_marker":
            host.remove(REBOOT_MARKER)
        elif change.action == "start_clients":
            start_clients(host)
            self._wait_for_fabric(host)
        elif change.action == "reload":
            self._reload(host)

    def _reload(self, host: Host) -> None:
        state = observe_reload(host)
        if state.loaded_version == state.on_disk:
            return
        if state.gpu_processes:
            raise in_use_error(state.gpu_processes, "Reloading the driver")
        if state.loaded is not None:
            stop_clients(host)
            late = foreign_holders(driver_holders(host))
            if late:
                start_clients(host)
                raise in_use_error(late, "Reloading the driver")
            self.tried = unload_modules(host)
            if self.tried:
                start_clients(host)
                return
        if state.nouveau_loaded:
            result = host.run(["rmmod", "nouveau"], timeout=_LOAD_TIMEOUT)
            if not result.ok:
                self.tried = "nouveau drives the GPU and cannot be unloaded (%s)" % result.last_line().rstrip(".")
                return
        result = host.run(["modprobe", "nvidia"], timeout=_LOAD_TIMEOUT)
        if not result.ok or observe_loaded_driver(host) is None:
            cause, reboot_helps = load_failure(host, state.kernel, result.last_line())
            if not reboot_helps:
                raise FleetError(
                    "module_not_loaded", "The driver module %s does not load: %s." % (state.on_disk, cause)
                )
            self.tried = "the module %s does not load: %s" % (state.on_disk, cause)
            return
        # CUDA needs nvidia_uvm; the others come back only where they were.
        for name in ("nvidia_uvm", *reversed([entry for entry in UNLOAD_ORDER if entry in state.modules])):
            if name not in ("nvidia",):
                host.run(["modprobe", name], timeout=_LOAD_TIMEOUT)
        start_clients(host)
        self._wait_for_fabric(host)

    def _wait_for_fabric(self, host: Host) -> None:
        """Wait until every GPU on an NVSwitch has joined the fabric; CUDA fails with error 802 before."""
        if not observe_gpus(host, with_smi=False).needs_fabric_manager:
            return
        deadline = host.monotonic() + _FABRIC_TIMEOUT
        states: set[str] = set()
        while True:
            result = host.run(["nvidia-smi", "-q", "-x"], timeout=90)
            try:
                gpus = parse_smi(result.stdout)[2]
            except ValueError:
                gpus = ()
            states = {gpu.fabric_state for gpu in gpus if gpu.fabric_state}
            if gpus and states <= {"Completed"}:
                return
            if host.monotonic() >= deadline:
                raise FleetError(
                    "fabric_not_ready",
                    "The driver is loaded, but after %d seconds the NVLink fabric is %s instead of Completed; look at "
                    "`journalctl -u nvidia-fabricmanager`, whose version must equal the driver's."
                    % (_FABRIC_TIMEOUT, ", ".join(sorted(states)) or result.last_line()),
                )
            host.sleep(_FABRIC_POLL)

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
        if state.loaded_version == state.on_disk:
            answer["message"] = "Driver %s: loaded = on disk = user space." % state.on_disk
            return answer
        reason = self.reboot_reason(state)
        if state.gpu_processes and state.loaded is not None:
            # A reboot takes the GPU away just the same.
            raise in_use_error(state.gpu_processes, "Reloading the driver")
        if reason:
            answer["reboot_required"] = True
            answer["reboot_reason"] = reason
            answer["message"] = "Driver %s is installed but %s: a reboot is needed because %s." % (
                state.on_disk,
                "%s is loaded" % state.loaded_version if state.loaded else "not loaded",
                reason,
            )
        else:
            answer["message"] = "Driver %s is installed but %s is loaded." % (
                state.on_disk,
                state.loaded_version or "no driver",
            )
        return answer
