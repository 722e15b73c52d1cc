# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The NVIDIA kernel module in memory, from procfs and sysfs, and how it is told from the one on the disk."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._host import Host


@dataclass(frozen=True)
class LoadedDriver:
    """The kernel module in memory. ``flavour`` is ``open``, ``proprietary`` or empty when it does not say.

    ``can_unload`` is False on a kernel built without module unloading.
    """

    version: str
    flavour: str
    can_unload: bool


class ModuleFile(t.NamedTuple):
    """The kernel module on the disk; empty strings when there is none, or when it does not say."""

    version: str = ""
    flavour: str = ""


def flavours_differ(one: str, other: str) -> bool:
    """Whether both flavours are known and not the same: what does not say is not taken for the other one."""
    return bool(one and other) and one != other


def is_loaded(loaded: LoadedDriver | None, file: ModuleFile) -> bool:
    """Whether the module in memory is the one on the disk (or neither is there). Both flavours of a driver have one version."""
    if loaded is None:
        return not file.version
    return loaded.version == file.version and not flavours_differ(loaded.flavour, file.flavour)


def told_apart(loaded: LoadedDriver | None, file: ModuleFile) -> tuple[str, str]:
    """The module in memory and the one on the disk in words; with their flavours where the version is the same."""
    if loaded is not None and loaded.version == file.version and flavours_differ(loaded.flavour, file.flavour):
        return "%s (%s)" % (loaded.version, loaded.flavour), "%s (%s)" % file
    return loaded.version if loaded is not None else "", file.version


def parse_driver_version(text: str) -> tuple[str, str]:
    """Version and flavour out of ``/proc/driver/nvidia/version``; empty strings when it is not understood."""
    for line in text.splitlines():
        if not line.startswith("NVRM version:"):
            continue
        version = re.search(r"\s(\d{3}\.\d+(?:\.\d+)?)\s", line + " ")
        flavour = "open" if "Open Kernel Module" in line else "proprietary" if "Kernel Module" in line else ""
        return (version.group(1) if version else "", flavour)
    return "", ""


def loaded_modules(host: Host) -> set[str]:
    """Names of loaded kernel modules that can be the NVIDIA driver's (from procfs and sysfs)."""
    names = {line.split(" ", 1)[0] for line in (host.read_text("/proc/modules") or "").splitlines() if line}
    for name in host.list_dir("/sys/module"):
        # Built-in modules have a directory too, but no initstate.
        if name not in names and (
            host.exists("/sys/module/%s/initstate" % name) or host.exists("/sys/module/%s/refcnt" % name)
        ):
            names.add(name)
    return names


def observe_loaded_driver(host: Host) -> LoadedDriver | None:
    """The loaded NVIDIA kernel module, or None. A missing refcnt does not mean that it is not loaded."""
    version, flavour = parse_driver_version(host.read_text("/proc/driver/nvidia/version") or "")
    sysfs = (host.read_text("/sys/module/nvidia/version") or "").strip()
    if not version and not sysfs:
        listed = re.search(r"^nvidia ", host.read_text("/proc/modules") or "", re.MULTILINE)
        if not listed and not host.exists("/sys/module/nvidia/initstate"):
            return None
    return LoadedDriver(sysfs or version, flavour, host.exists("/sys/module/nvidia/refcnt"))
