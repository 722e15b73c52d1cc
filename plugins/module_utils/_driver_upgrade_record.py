# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a host knows of its own driver upgrade: how far it is, what was there before, and who is at it.

It lies on the host, so that any controller can go on. It is a memory, not the truth: every step looks at reality first.
"""

from __future__ import annotations

import hashlib
import json
import typing as t
from dataclasses import asdict, dataclass, field, replace

from ._errors import FleetError
from ._host import Host
from ._nim_paths import BASE_DIRECTORY, MAINTENANCE_FILE
from ._untrusted import misfit, parse_json, real_number, strings

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
#: How an upgrade has ended: at its target; with the old driver never taken out; with the old driver put back; outside.
UPGRADED = "upgraded"
RESTORED = "restored"
ROLLED_BACK = "rolled_back"
STRANDED = "stranded"

#: Seconds after its last sign of life that the word of another run is honoured.
LEASE = 600.0

_SHAPE = {
    "digest": str,
    "target": str,
    "step": str,
    "outcome": str,
    "reboot": str,
    "boot_id": str,
    "validated": str,
    "prestaged": str,
    "way_back": str,
    "workloads": [str],
    "clients": [str],
    "steps": [{"step": str}],
    "before": {"loaded": str, "branch": str, "version": str, "flavour": str, "source": str, "gpus": int},
    "failure": {"step": str, "reason": str, "message": str},
    "claim": {"run": str},
}


@dataclass(frozen=True)
class Before:
    """The driver that was there when the upgrade began, and that a rollback brings back.

    Attributes:
        version: Of the packages; empty when there was no driver.
        gpus: GPUs that the driver showed; 0 when it was not loaded.
    """

    loaded: str = ""
    branch: str = ""
    version: str = ""
    flavour: str = ""
    source: str = ""
    gpus: int = 0


@dataclass(frozen=True)
class Record:
    """One upgrade of one host.

    Attributes:
        digest: Of the target; another target is another upgrade.
        target: The target in words.
        step: The last finished one of :data:`STEPS`.
        outcome: Empty while the upgrade is under way.
        workloads: NIM services that ran before and run again in the end.
        clients: Services of the driver that ran before.
        reboot: Why only a reboot loads the new driver; empty when none is due.
        boot_id: The boot in which ``reboot`` was found out.
        prestaged: Digest of the target whose packages lie ready.
        way_back: Why the old driver could not be put back; empty when it can.
        validated: The boot and driver that were validated.
        steps: What was done when: ``step``, ``at`` (seconds since the epoch), ``seconds``.
        failure: ``step``, ``reason`` and ``message`` of what went wrong last; empty when nothing did.
        claim: ``run`` (who is at it) and ``seen`` (seconds since the epoch).
    """

    digest: str = ""
    target: str = ""
    step: str = ""
    outcome: str = ""
    started: float = 0.0
    before: Before = field(default_factory=Before)
    workloads: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    reboot: str = ""
    boot_id: str = ""
    prestaged: str = ""
    way_back: str = ""
    validated: str = ""
    steps: tuple[dict[str, t.Any], ...] = ()
    failure: t.Mapping[str, t.Any] = field(default_factory=dict)
    claim: t.Mapping[str, t.Any] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether the host was taken out of service and not given back."""
        return (not self.outcome and reached(self, "drained")) or self.outcome == STRANDED

    def as_dict(self) -> dict[str, t.Any]:
        return dict(asdict(self), version=1)


def reached(record: Record, step: str) -> bool:
    """Whether a record has come as far as a step."""
    return record.step in STEPS and STEPS.index(record.step) >= STEPS.index(step)


def digest_of(parts: t.Mapping[str, t.Any]) -> str:
    """Short name of a target: the same for the same wishes."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def read_record(host: Host) -> Record | None:
    """The record of a host, None when it never was upgraded.

    Raises:
        FleetError: ``state_unreadable`` when somebody broke the file: it is reported and left as it is.
    """
    text = host.read_text(RECORD)
    if text is None:
        return None
    try:
        found = parse_json(text)
        wrong = misfit(found, _SHAPE) or ("" if isinstance(found, dict) else "it is no object")
    except ValueError as error:
        found, wrong = {}, str(error)
    if wrong:
        raise FleetError(
            "state_unreadable",
            "%s is not what an upgrade of the driver writes (%s), so it is unknown how far this host is; look at it, and "
            "remove it and %s when the host serves." % (RECORD, wrong, MAINTENANCE_FILE),
        )
    before = found.get("before") or {}
    return Record(
        **{
            key: str(found.get(key) or "")
            for key in (
                "digest",
                "target",
                "step",
                "outcome",
                "reboot",
                "boot_id",
                "prestaged",
                "way_back",
                "validated",
            )
        },
        started=real_number(found.get("started")),
        before=Before(
            **{key: str(before.get(key) or "") for key in ("loaded", "branch", "version", "flavour", "source")},
            gpus=int(before.get("gpus") or 0),
        ),
        workloads=tuple(strings(found.get("workloads"))),
        clients=tuple(strings(found.get("clients"))),
        steps=tuple(found.get("steps") or ()),
        failure=found.get("failure") or {},
        claim=found.get("claim") or {},
    )


def write_record(host: Host, record: Record) -> Record:
    """Put a record on the host, readable for everybody: there are no secrets in it."""
    host.make_dir("/var/lib/gpu_fleet", mode=0o755)
    host.write_file(RECORD, json.dumps(record.as_dict(), sort_keys=True) + "\n", mode=0o644)
    return record


def finished(record: Record, step: str, now: float, began: float) -> Record:
    """The record with one more finished step; one that is done again has its new times and takes nothing back."""
    entry = {"step": step, "at": round(began, 1), "seconds": round(max(0.0, now - began), 1)}
    others = tuple(old for old in record.steps if old.get("step") != step)
    return replace(record, step=record.step if reached(record, step) else step, steps=(*others, entry))


# -- who is at it ---------------------------------------------------------------------------------


def claimed(record: Record, run: str, now: float, *, take_over: bool = False) -> Record:
    """The record with the word of this run in it.

    Args:
        run: Who upgrades, in words; empty claims nothing and honours no claim.

    Raises:
        FleetError: ``upgrade_running`` when another run is at this host.
    """
    if not run:
        return record
    other = str(record.claim.get("run") or "")
    seen = real_number(record.claim.get("seen"))
    # A clock that was set back must not lock the host for ever.
    if other and other != run and abs(now - seen) < LEASE and not take_over:
        raise FleetError(
            "upgrade_running",
            "The driver of this host is being upgraded by %s, last seen %d seconds ago; wait for that run, or, when it is "
            "known to have ended, set driver_upgrade_take_over to true (after %d minutes without a sign of it that is not "
            "needed)." % (other, max(0, int(now - seen)), LEASE // 60),
            claim=dict(record.claim),
        )
    return replace(record, claim={"run": run, "seen": round(now, 1)})


def released(record: Record) -> Record:
    return replace(record, claim={})


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
