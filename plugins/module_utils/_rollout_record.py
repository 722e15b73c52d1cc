# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a host knows of the work for which it is taken out of service: how far it is, what ran before, and who is at it.

It lies on the host, so that any controller can go on. It is a memory, not the truth: every step looks at reality first.
"""

from __future__ import annotations

import hashlib
import json
import os
import traceback
import typing as t
from dataclasses import asdict, dataclass, field, replace

from ._errors import FleetError
from ._host import Host
from ._nim_paths import MAINTENANCE_FILE
from ._own_state import read_own_state
from ._redaction import scrub
from ._untrusted import Json, real_number, strings

#: Where a call of a module that does such work stops.
GOALS = ("prestaged", "drained", "ready", "returned", "restored")
#: Options that they share; documented in the fragment ``rollout``.
ROLLOUT_OPTIONS: dict[str, t.Any] = {
    "state": {"type": "str", "choices": list(GOALS), "default": "ready"},
    "run": {"type": "str", "default": ""},
    "take_over": {"type": "bool", "default": False},
    "lease": {"type": "int", "default": 600},
}

#: How it has ended: as wanted; with nothing taken away; with what was there before put back; outside.
UPDATED = "updated"
RESTORED = "restored"
ROLLED_BACK = "rolled_back"
STRANDED = "stranded"

#: Seconds after its last sign of life that the word of another run is honoured, where it has not asked for more.
LEASE = 600

_DIRECTORY = "/var/lib/gpu_fleet"
#: Every kind of such work, and what people call it.
RECORDS = {
    _DIRECTORY + "/driver-upgrade.json": "the upgrade of its driver",
    _DIRECTORY + "/nim-deploy.json": "a deployment of its models",
}


@dataclass(frozen=True)
class RolloutRecord:
    """One rollout on one host.

    Attributes:
        digest: Of the target; another target is another rollout.
        target: The target in words.
        step: The last finished one of ``order``.
        outcome: Empty while it is under way.
        started: Seconds since the epoch.
        workloads: NIM services that ran before and run again in the end.
        serving: Those of them that were ready before, and after a way back those that are ready then.
        steps: What was done when: ``step``, ``at`` (seconds since the epoch), ``seconds``.
        failure: ``step``, ``reason`` and ``message`` of what went wrong last, and when: ``began`` (the step), ``at`` (it failed) and
            ``until`` (the way back had ended), in seconds since the epoch; empty when nothing did.
        claim: ``run`` (who is at it), ``seen`` (seconds since the epoch) and ``lease`` (seconds that it counts).
    """

    #: Its steps in their order.
    order: t.ClassVar[t.Tuple[str, ...]] = ()
    #: Where it lies.
    path: t.ClassVar[str] = ""
    #: Shape of the file beside what all kinds have, as :func:`._untrusted.misfit` takes it.
    shape: t.ClassVar[t.Mapping[str, t.Any]] = {}

    digest: str = ""
    target: str = ""
    step: str = ""
    outcome: str = ""
    started: float = 0.0
    workloads: t.Tuple[str, ...] = ()
    serving: t.Tuple[str, ...] = ()
    steps: t.Tuple[t.Dict[str, t.Any], ...] = ()
    failure: t.Mapping[str, t.Any] = field(default_factory=dict)
    claim: t.Mapping[str, t.Any] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether the host was taken out of service and not given back."""
        return (not self.outcome and self.reached("drained")) or self.outcome == STRANDED

    @property
    def awaited(self) -> tuple[str, ...]:
        """Services that must be ready on a way back: one that was not ready before keeps no other out of service."""
        return self.serving or self.workloads

    def reached(self, step: str) -> bool:
        """Whether it has come as far as a step."""
        return self.step in self.order and self.order.index(self.step) >= self.order.index(step)

    def as_dict(self) -> dict[str, t.Any]:
        return dict(asdict(self), version=1)

    @classmethod
    def more(cls, found: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """What a kind of record has beside the rest, out of its file."""
        return {}


R = t.TypeVar("R", bound=RolloutRecord)

_SHAPE = {
    "digest": str,
    "target": str,
    "step": str,
    "outcome": str,
    "workloads": [str],
    "serving": [str],
    "steps": [{"step": str}],
    "failure": {"step": str, "reason": str, "message": str},
    "claim": {"run": str},
}


def digest_of(parts: t.Mapping[str, t.Any]) -> str:
    """Short name of a target: the same for the same wishes."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def _read(host: Host, path: str, shape: t.Mapping[str, t.Any]) -> Json | None:
    remedy = "it tells how far %s has come on this host; once the host serves it can go, and %s with it" % (
        RECORDS[path],
        MAINTENANCE_FILE,
    )
    return read_own_state(host, path, {**_SHAPE, **shape}, remedy, partial=True)


def read(host: Host, kind: t.Type[R]) -> R | None:
    """The record of a host, None when there never was one.

    Raises:
        FleetError: ``state_unreadable`` when somebody broke the file: it is reported and left as it is.
    """
    found = _read(host, kind.path, kind.shape)
    if found is None:
        return None
    return kind(
        **{key: str(found.get(key) or "") for key in ("digest", "target", "step", "outcome")},
        started=real_number(found.get("started")),
        workloads=tuple(strings(found.get("workloads"))),
        serving=tuple(strings(found.get("serving"))),
        steps=tuple(found.get("steps") or ()),
        failure=found.get("failure") or {},
        claim=found.get("claim") or {},
        **kind.more(found),
    )


def write(host: Host, record: R) -> R:
    """Put a record on the host, readable for everybody: there are no secrets in it."""
    host.make_dir(os.path.dirname(record.path), mode=0o755)
    host.write_file(record.path, json.dumps(record.as_dict(), sort_keys=True) + "\n", mode=0o644)
    return record


def note(host: Host, record: R) -> R:
    """Put a record on the host if that can be done: where its disk is full it has to come back all the same."""
    try:
        return write(host, record)
    except FleetError:
        return record


def finished(record: R, step: str, now: float, began: float) -> R:
    """The record with one more finished step; one that is done again has its new times and takes nothing back."""
    entry = {"step": step, "at": round(began, 1), "seconds": round(max(0.0, now - began), 1)}
    others = tuple(old for old in record.steps if old.get("step") != step)
    return replace(record, step=record.step if record.reached(step) else step, steps=(*others, entry))


def failed(step: str, error: FleetError, began: float, now: float) -> dict[str, t.Any]:
    """What a record keeps of a step that failed."""
    return {
        "step": step,
        "reason": error.reason,
        "message": scrub(error.message),
        "began": round(began, 1),
        "at": round(now, 1),
    }


def foreseen(what: str, error: Exception) -> FleetError:
    """The error itself, or one for what nobody has foreseen, such as no memory; that without its text, which may be secret."""
    if isinstance(error, FleetError):
        return error
    where = traceback.extract_tb(error.__traceback__)[-1]
    return FleetError(
        "internal_error",
        "%s failed with %s (%s:%s); look at 'journalctl -k' for a lack of memory, and report it otherwise."
        % (what, type(error).__name__, os.path.basename(where.filename), where.lineno),
    )


def taken_away(kind: t.Type[RolloutRecord], held: str) -> FleetError:
    """The error for a host that somebody else took over while it was out of service.

    Args:
        held: Why it is left alone now.
    """
    return FleetError(
        "host_held",
        "This host is out of service for %s, and now %s; it stays out with its record, and running again goes on when that "
        "has ended." % (RECORDS[kind.path], held.partition(";")[0]),
    )


def went_back(record: R, outcome: str, now: float) -> R:
    """The record when the way back has ended."""
    return replace(record, outcome=outcome, failure={**record.failure, "until": round(now, 1)})


# -- who is at it ---------------------------------------------------------------------------------


def claimed(record: R, run: str, now: float, *, lease: int = LEASE, take_over: bool = False) -> R:
    """The record with the word of this run in it.

    Args:
        run: Who is at it, in words; empty claims nothing and honours no claim.
        lease: Seconds that the word counts without another sign of life.

    Raises:
        FleetError: ``upgrade_running`` when another run is at this host.
    """
    if not run:
        return record
    if not take_over:
        refuse_other(record.claim, run, now, RECORDS[record.path])
    return replace(record, claim={"run": run, "seen": round(now, 1), "lease": lease})


def with_signs_of_life(
    host: Host, kind: t.Type[RolloutRecord], run: str, lease: int, tell: t.Callable[[str], None]
) -> t.Callable[[str], None]:
    """What hands lines on to ``tell``, and leaves a sign of life now and then for whoever else would like to begin."""
    seen = host.time()

    def told(text: str) -> None:
        nonlocal seen
        tell(text)
        found = read(host, kind) if run and host.time() - seen > 60 else None
        if found is not None:
            seen = host.time()
            note(host, claimed(found, run, seen, lease=lease, take_over=True))

    return told


def refuse_other(claim: t.Mapping[str, t.Any], run: str, now: float, work: str) -> None:
    """Honour the word of another run.

    Args:
        work: What it is at, in words.

    Raises:
        FleetError: ``upgrade_running`` when there is one.
    """
    other = str(claim.get("run") or "")
    seen, lease = real_number(claim.get("seen")), real_number(claim.get("lease"), float(LEASE))
    # A clock that was set back must not lock the host for ever.
    if not other or other == run or abs(now - seen) >= lease:
        return
    raise FleetError(
        "upgrade_running",
        "%s is at %s on this host, last seen %d seconds ago; wait for that run to end, or, when it is known to have "
        "ended, set driver_upgrade_take_over (nim_deploy_take_over) to true; %d minutes after its last sign that is not "
        "needed." % (other, work, max(0, int(now - seen)), lease // 60),
        claim=dict(claim),
    )


def released(record: R) -> R:
    return replace(record, claim={})


@dataclass(frozen=True)
class Rival:
    """Work of another kind on the same host.

    Attributes:
        work: What people call it.
        out: Whether it has taken the host out of service.
        claim: Who is at it.
        damage: Why its record cannot be read, so that nobody knows whether the host is free.
    """

    work: str
    out: bool = False
    claim: t.Mapping[str, t.Any] = field(default_factory=dict)
    damage: FleetError | None = None

    def refuse(self, run: str, now: float, *, take_over: bool = False, begun: bool = False) -> None:
        """Leave the host to the other work.

        Args:
            begun: Whether the own work has this host out of service: then a damaged record must not keep it out.

        Raises:
            FleetError: ``upgrade_running`` when somebody is at it, ``state_unreadable``.
        """
        if self.damage is not None and not begun:
            raise self.damage
        if run and not take_over:
            refuse_other(self.claim, run, now, self.work)


def rival(host: Host, path: str) -> Rival | None:
    """What another kind of work has left on this host; None when it has left nothing that matters.

    Args:
        path: Of the kind that asks.
    """
    for other, work in RECORDS.items():
        if other == path:
            continue
        try:
            found = _read(host, other, {}) or {}
        except FleetError as error:
            return Rival(work, damage=error)
        claim, outcome = found.get("claim") or {}, found.get("outcome")
        begun = any(step.get("step") == "drained" for step in found.get("steps") or ())
        out = outcome == STRANDED or (not outcome and begun)
        if out or claim:
            return Rival(work, out, claim)
    return None
