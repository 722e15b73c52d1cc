# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The NVIDIA driver in the kernel: its services stopped and started around a change, its modules taken out, and why the kernel
does not take one."""

from __future__ import annotations

import json
import typing as t

from ._driver_clients import CLIENT_UNITS, RECORD, UNLOAD_ORDER, idle_daemons, read_record
from ._errors import FleetError
from ._host import Host
from ._loaded_driver import loaded_modules, observe_loaded_driver
from ._systemd import unit_properties

_STOP_TIMEOUT = 90.0  # seconds for one systemctl call
LOAD_TIMEOUT = 180.0  # seconds; eight GPUs take half a minute

#: How often something is tried that a moment may be in the way of, and seconds between.
_TRIES, _PAUSE = 3, 2.0

_KEY_SIGNS = ("Key was rejected by service", "Required key not available", "key was rejected")


def active_units(host: Host, units: t.Sequence[str] = CLIENT_UNITS) -> list[str]:
    """Those of the units that run now (or wait, for a path unit), in the given order."""
    result = host.run(["systemctl", "is-active", *units], timeout=_STOP_TIMEOUT)
    states = result.stdout.split()
    if len(states) != len(units):
        return []
    return [unit for unit, state in zip(units, states) if state in ("active", "activating", "reloading")]


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
            start_clients_that_can(host)
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
    for unit in _stopped(host):
        start_client(host, unit)
    if units:
        host.remove(RECORD)
    return list(units)


def start_clients_that_can(host: Host) -> None:
    """The same where the old module stays loaded until a reboot: what is of the new driver already may refuse it.

    That is no failure of its own, as the reboot starts it; until then the record stays.
    """
    refused = False
    for unit in _stopped(host):
        try:
            start_client(host, unit)
        except FleetError:
            refused = True
    if not refused:
        host.remove(RECORD)


def _stopped(host: Host) -> list[str]:
    """What does not run and should, in the order in which it is started."""
    units = read_record(host)
    return [*(unit for unit in idle_daemons(host) if unit not in units), *reversed(units)]


def start_client(host: Host, unit: str) -> None:
    """Start a service of the driver; one that went with the packages of the old driver is not missed.

    Raises:
        FleetError: ``client_not_started`` with the unit's own words.
    """
    # Earlier failures, while no module was loaded, would block the next start.
    host.run(["systemctl", "reset-failed", unit], timeout=_STOP_TIMEOUT)
    result = host.run(["systemctl", "start", unit], timeout=_STOP_TIMEOUT)
    if result.ok or unit_properties(host, unit, "LoadState").get("LoadState") == "not-found":
        return
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
        result = host.run(["rmmod", name], timeout=LOAD_TIMEOUT)
        if not result.ok:
            count = (host.read_text("/sys/module/%s/refcnt" % name) or "").strip()
            users = ", ".join(host.list_dir("/sys/module/%s/holders" % name))
            for earlier in reversed(removed):
                host.run(["modprobe", earlier], timeout=LOAD_TIMEOUT)
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


def unload_patiently(host: Host) -> str:
    """As :func:`unload_modules`: somebody may use it for just this moment, and a reboot is a high price for that."""
    why = unload_modules(host)
    for _again in range(_TRIES - 1):
        loaded = observe_loaded_driver(host)
        if not why or loaded is None or not loaded.can_unload:
            break
        host.sleep(_PAUSE)
        why = unload_modules(host)
    return why


def patiently(host: Host, do: t.Callable[[], object]) -> None:
    """Do what is refused while somebody uses a GPU, which may be for a moment only.

    Raises:
        FleetError: As ``do`` does; ``gpu_in_use`` when it stays so.
    """
    for _again in range(_TRIES - 1):
        try:
            do()
        except FleetError as error:
            if error.reason != "gpu_in_use":
                raise
            host.sleep(_PAUSE)
        else:
            return
    do()


def restore_modules(host: Host, names: t.Sequence[str]) -> None:
    """Load those modules beside the driver that were loaded before it was changed: RDMA and storage go without them,
    slowly and without a word.

    Raises:
        FleetError: ``module_not_loaded``.
    """
    missing = set(names) - loaded_modules(host)
    for name in reversed([name for name in UNLOAD_ORDER if name in missing]):
        host.check(
            ["modprobe", name],
            reason="module_not_loaded",
            doing="Loading kernel module %s, which was loaded before the driver was changed," % name,
            remedy="It may have to be built for this driver; see 'dkms status' and 'journalctl -k'.",
            timeout=LOAD_TIMEOUT,
        )


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
