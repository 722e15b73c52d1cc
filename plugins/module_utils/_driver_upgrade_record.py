# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a host knows of its own driver upgrade beside what every rollout knows, and the marker that keeps services down."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ._host import Host
from ._nim_paths import BASE_DIRECTORY, MAINTENANCE_FILE
from ._rollout_record import RolloutRecord, read
from ._untrusted import strings

RECORD = "/var/lib/gpu_fleet/driver-upgrade.json"
#: First words of the maintenance marker when this upgrade has written it; any other marker is somebody else's.
MARK = "gpu_fleet.nim.driver_upgrade"

#: The steps in their order; a record names the last one that was finished.
STEPS = (
    "planned",
    "prestaged",
    "drained",
    "workloads_stopped",
    "clients_stopped",
    "unloaded",
    "packages_changed",
    "loaded",
    "validated",
    "workloads_started",
    "ready",
    "returned",
)
_TEXTS = ("reboot", "rebooted", "boot_id", "chosen", "prestaged", "way_back", "validated")


@dataclass(frozen=True)
class Before:
    """The driver that was there when the upgrade began, and that a rollback brings back.

    Attributes:
        version: Of the packages; empty when there was no driver.
        flavour: Of the module that they brought.
        gpus: GPUs that the driver showed; 0 when it was not loaded.
    """

    loaded: str = ""
    branch: str = ""
    version: str = ""
    flavour: str = ""
    source: str = ""
    gpus: int = 0


@dataclass(frozen=True)
class Record(RolloutRecord):
    """One upgrade of one host.

    Attributes:
        clients: Services of the driver that ran before.
        modules: Kernel modules of the driver that were loaded before.
        reboot: Why only a reboot loads the new driver; empty when none is due.
        rebooted: Version that a reboot did not load; empty when none.
        boot_id: The boot in which ``reboot`` was found out.
        chosen: Version of the packages that lie ready.
        prestaged: Digest of the target whose packages lie ready.
        way_back: Why the old driver could not be put back; empty when it can.
        validated: The boot and driver that were validated.
    """

    order: t.ClassVar[t.Tuple[str, ...]] = STEPS
    path: t.ClassVar[str] = RECORD
    shape: t.ClassVar[t.Mapping[str, t.Any]] = {
        **dict.fromkeys(_TEXTS, str),
        "clients": [str],
        "modules": [str],
        "before": {"loaded": str, "branch": str, "version": str, "flavour": str, "source": str, "gpus": int},
    }

    before: Before = field(default_factory=Before)
    clients: t.Tuple[str, ...] = ()
    modules: t.Tuple[str, ...] = ()
    reboot: str = ""
    rebooted: str = ""
    boot_id: str = ""
    chosen: str = ""
    prestaged: str = ""
    way_back: str = ""
    validated: str = ""

    @classmethod
    def more(cls, found: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        before = found.get("before") or {}
        return {
            **{name: str(found.get(name) or "") for name in _TEXTS},
            "clients": tuple(strings(found.get("clients"))),
            "modules": tuple(strings(found.get("modules"))),
            "before": Before(
                **{key: str(before.get(key) or "") for key in ("loaded", "branch", "version", "flavour", "source")},
                gpus=int(before.get("gpus") or 0),
            ),
        }


def read_record(host: Host) -> Record | None:
    """The record of a host, None when its driver was never upgraded.

    Raises:
        FleetError: ``state_unreadable``.
    """
    return read(host, Record)


# -- maintenance ----------------------------------------------------------------------------------


def maintenance(host: Host) -> str:
    """Who keeps NIM services from starting: ``ours``, ``foreign``, or empty for nobody."""
    text = host.read_text(MAINTENANCE_FILE)
    if text is None:
        return "foreign" if host.exists(MAINTENANCE_FILE) else ""
    return "ours" if text.startswith(MARK) else "foreign"


def begin_maintenance(host: Host, target: str) -> None:
    """Keep NIM services from starting, also after a reboot."""
    if maintenance(host):
        return
    if not host.exists(BASE_DIRECTORY):
        host.make_dir(BASE_DIRECTORY, mode=0o755)
    host.write_file(MAINTENANCE_FILE, "%s: the driver is upgraded to %s; see %s\n" % (MARK, target, RECORD), mode=0o644)


def end_maintenance(host: Host) -> None:
    """Let them start again, unless somebody else does not want it."""
    if maintenance(host) == "ours":
        host.remove(MAINTENANCE_FILE)
