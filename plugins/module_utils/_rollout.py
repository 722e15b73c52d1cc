# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""In which batches hosts are taken out of service while the fleet serves: pure functions of what is known of its hosts.

Slots are counted as NVIDIA's k8s-operator-libs counts them (pkg/upgrade, GetUpgradesAvailable): a host that is down or taken
out by somebody else uses up the budget of unavailable hosts. Added to it: what every model keeps. A host that this upgrade has
already taken out costs nothing more, so it comes first.

What is done to the hosts does not matter here: playbooks upgrade_drivers and deploy plan with it.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field, replace

from ._errors import FleetError

#: What a batch is for.
RESUME = "resume"
CANARY = "canary"
ROLL = "roll"


@dataclass(frozen=True)
class Share:
    """A number of hosts: absolute, or percent of a total and then rounded up."""

    number: int
    percent: bool = False

    def of(self, total: int) -> int:
        # Without floats: 7 % of 100 must be 7.
        return -(-self.number * total // 100) if self.percent else self.number

    def __str__(self) -> str:
        return "%d%s" % (self.number, "%" if self.percent else "")


def parse_share(option: str, value: t.Any) -> Share:
    """``3``, ``"3"`` or ``"25%"``.

    Raises:
        FleetError: ``invalid_option``.
    """
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*(%?)\s*", str(value))
    if isinstance(value, bool) or found is None or (found.group(2) and int(found.group(1)) > 100):
        raise FleetError(
            "invalid_option",
            "%s = %r: neither a number of hosts nor a percentage; write it like 2 or '25%%'." % (option, value),
        )
    return Share(int(found.group(1)), bool(found.group(2)))


@dataclass(frozen=True)
class FleetHost:
    """What is known of one host.

    Attributes:
        serving: Models that are ready on it and may be asked; nothing on a host that is not available.
        models: Models that it has to serve in the end.
        due: Whether it is not as wanted.
        available: Whether clients are served by it, or could be.
        resumable: Whether an earlier run has taken it out, or was about to; where gateways still ask it, it is available all the same.
        down: Whether it is not available because none of its models is ready, which is nobody's wish.
        skip: Why it is left alone; empty when it is not.
        canary: Whether it is to be tried before the others.
        lost: Whether it cannot be reached.
        beside: Whether this run does not have it: it only counts.
    """

    name: str
    serving: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    due: bool = True
    available: bool = True
    resumable: bool = False
    down: bool = False
    skip: str = ""
    canary: bool = False
    lost: bool = False
    beside: bool = False

    @property
    def wanted(self) -> bool:
        """Whether a batch may have it: whoever has taken a host out gives it back himself."""
        return self.due and not self.skip and (self.available or self.resumable or self.down)


@dataclass(frozen=True)
class Limits:
    """What the operator allows.

    Attributes:
        max_parallel: Hosts in one batch; 0 for any number.
        max_unavailable: Hosts out of service at once, whoever took them out.
        min_ready: Ready replicas that every model keeps.
        min_ready_of: Model -> replicas, for models that keep another number.
    """

    max_parallel: Share = Share(0)
    max_unavailable: Share = Share(25, percent=True)
    min_ready: int = 1
    min_ready_of: t.Mapping[str, int] = field(default_factory=dict)

    def keeps(self, model: str) -> int:
        return self.min_ready_of.get(model, self.min_ready)


@dataclass(frozen=True)
class Batch:
    """Hosts that are taken out together.

    Attributes:
        kind: ``resume``, ``canary`` or ``roll``.
        unavailable: Hosts out of service while it runs, those included that were out before.
        capacity: Model -> ready replicas while it runs.
    """

    number: int
    kind: str
    hosts: tuple[str, ...]
    unavailable: int
    capacity: t.Mapping[str, int]

    def as_dict(self) -> dict[str, t.Any]:
        return {
            "number": self.number,
            "kind": self.kind,
            "hosts": list(self.hosts),
            "unavailable": self.unavailable,
            "capacity": dict(sorted(self.capacity.items())),
        }


@dataclass(frozen=True)
class Rollout:
    """The whole plan.

    Attributes:
        capacity: Model -> ready replicas before anything begins.
        left: Host -> why it is in no batch; hosts that are as wanted are not in it.
        waits: Those of them that somebody may expect to be done: they cannot be reached, or the limits do not let them go.
        done: Hosts that are as wanted.
        after: Model -> ready replicas when all went well.
    """

    batches: tuple[Batch, ...]
    left: t.Mapping[str, str]
    done: tuple[str, ...]
    capacity: t.Mapping[str, int]
    max_unavailable: int
    max_parallel: int
    waits: tuple[str, ...] = ()
    after: t.Mapping[str, int] = field(default_factory=dict)

    @property
    def order(self) -> tuple[str, ...]:
        """All hosts of all batches in the order in which they are taken out."""
        return tuple(host for batch in self.batches for host in batch.hosts)

    def as_dict(self) -> dict[str, t.Any]:
        return {
            "batches": [batch.as_dict() for batch in self.batches],
            "left": dict(self.left),
            "waits": list(self.waits),
            "done": list(self.done),
            "capacity": dict(sorted(self.capacity.items())),
            "after": dict(sorted(self.after.items())),
            "max_unavailable": self.max_unavailable,
            "max_parallel": self.max_parallel,
        }


class _Fleet:
    """The fleet at one moment."""

    def __init__(self, hosts: t.Sequence[FleetHost], limits: Limits) -> None:
        self.hosts = {host.name: host for host in hosts}
        self.limits = limits
        total = len(self.hosts)
        # With no host at all nothing could ever be done; percentages are of the whole fleet.
        self.max_unavailable = max(1, limits.max_unavailable.of(total)) if total else 0
        self.max_parallel = limits.max_parallel.of(total)
        if limits.max_parallel.percent:
            self.max_parallel = max(1, self.max_parallel)

    def models(self) -> list[str]:
        return sorted({model for host in self.hosts.values() for model in (*host.serving, *host.models)})

    def capacity(self, out: t.Collection[str] = ()) -> dict[str, int]:
        """Model -> ready replicas while these hosts are out."""
        return {
            model: sum(model in host.serving for name, host in self.hosts.items() if name not in out)
            for model in self.models()
        }

    def unavailable(self, out: t.Collection[str] = ()) -> list[str]:
        """Hosts that are out of service while these are taken out as well."""
        return [name for name, host in self.hosts.items() if not host.available or name in out]

    def obstacle(self, name: str, out: t.Sequence[str]) -> str:
        """Why a host cannot be taken out while these are; empty when it can."""
        host = self.hosts[name]
        if self.max_parallel and len(out) >= self.max_parallel:
            return "%d hosts go at once" % self.max_parallel
        if not host.available:
            # It is out already: nobody loses anything.
            return ""
        unavailable = self.unavailable(out)
        if len(unavailable) >= self.max_unavailable:
            return "%d of at most %d hosts are out of service (%s)" % (
                len(unavailable),
                self.max_unavailable,
                ", ".join(unavailable[:6]) + (", …" if len(unavailable) > 6 else ""),
            )
        remaining = self.capacity([*out, name])
        for model in sorted(host.serving):
            if remaining[model] < self.limits.keeps(model):
                return "model %s would have %d ready replica%s and keeps at least %d" % (
                    model,
                    remaining[model],
                    "" if remaining[model] == 1 else "s",
                    self.limits.keeps(model),
                )
        return ""

    def fill(self, names: t.Iterable[str]) -> tuple[list[str], dict[str, str]]:
        """Those that can be out together, taken in the given order, and why each of the others cannot."""
        chosen: list[str] = []
        obstacles: dict[str, str] = {}
        for name in names:
            obstacle = self.obstacle(name, chosen)
            if obstacle:
                obstacles[name] = obstacle
            else:
                chosen.append(name)
        return chosen, obstacles

    def batch(self, number: int, kind: str, names: t.Sequence[str]) -> Batch:
        return Batch(number, kind, tuple(names), len(self.unavailable(names)), self.capacity(names))

    def returned(self, names: t.Iterable[str]) -> None:
        """These have come back, and a host comes back when all its models are ready."""
        for name in names:
            host = self.hosts[name]
            self.hosts[name] = replace(
                host, due=False, available=True, resumable=False, down=False, serving=host.serving | host.models
            )


def plan_fleet(hosts: t.Sequence[FleetHost], limits: Limits) -> Rollout:
    """Batches that have every host that can go, in the order of ``hosts``, under the limits at every moment.

    First those that an earlier run has left outside, then the canaries (the first host where none is named), then the rest;
    the plan is one of success, and :func:`admit` asks again before each batch.
    """
    fleet = _Fleet(hosts, limits)
    before = fleet.capacity()
    left = {host.name: reason for host in hosts for reason in [_reason(host)] if reason}
    waiting = [host.name for host in hosts if host.wanted]
    batches: list[Batch] = []

    def roll(names: t.Sequence[str], kind: str) -> dict[str, str]:
        """Batches of all of them that can go; why each of the others cannot."""
        pending = list(names)
        while pending:
            chosen, obstacles = fleet.fill(pending)
            if not chosen:
                return obstacles
            batches.append(fleet.batch(len(batches) + 1, kind, chosen))
            fleet.returned(chosen)
            pending = [name for name in pending if name not in chosen]
        return {}

    resumed = [name for name in waiting if fleet.hosts[name].resumable and not fleet.hosts[name].available]
    left.update(roll(resumed, RESUME))
    rest = [name for name in waiting if name not in resumed]
    canaries = [name for name in rest if fleet.hosts[name].canary]
    if not any(not fleet.obstacle(name, ()) for name in canaries):
        # The first that can go, of those that serve where there is one: nothing is rolled out that no host has tried.
        able = sorted((name for name in rest if not fleet.obstacle(name, ())), key=lambda name: fleet.hosts[name].down)
        canaries = able[:1]
    roll(canaries, CANARY)
    # What stood in a canary's way may be gone.
    left.update(roll([name for name in rest if fleet.hosts[name].due], ROLL))
    names = {name for batch in batches for name in batch.hosts}
    left = {name: reason for name, reason in left.items() if name not in names}
    return Rollout(
        batches=tuple(batches),
        left=left,
        waits=tuple(host.name for host in hosts if host.name in left and (host.wanted or host.lost)),
        done=tuple(host.name for host in hosts if not host.due and not host.skip and not host.beside),
        capacity=before,
        max_unavailable=fleet.max_unavailable,
        max_parallel=fleet.max_parallel,
        after=fleet.capacity(),
    )


def _reason(host: FleetHost) -> str:
    """Why no batch may have a host that is due; empty when one may."""
    if host.skip:
        return host.skip
    if host.due and not host.wanted:
        return "it is out of service"
    return ""


def admit(
    hosts: t.Sequence[FleetHost], limits: Limits, batch: t.Sequence[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which hosts of a batch may go now, as the fleet really is, and why each of the others may not."""
    fleet = _Fleet(hosts, limits)
    reasons = {name: _reason(fleet.hosts[name]) for name in batch}
    chosen, obstacles = fleet.fill([name for name in batch if fleet.hosts[name].wanted])
    return tuple(chosen), {
        **{name: reason for name, reason in reasons.items() if reason},
        **obstacles,
    }


def exhausted(failed: t.Collection[str], budget: Share, total: int) -> str:
    """Why no further batch may begin; empty when one may.

    Args:
        failed: Hosts of this run that failed or could not be reached, in all batches so far.
        total: Hosts that the run set out with.
    """
    allowed = budget.of(total)
    if len(set(failed)) <= allowed:
        return ""
    names = sorted(set(failed))
    return "%d host%s failed or cannot be reached (%s) and the budget is %d" % (
        len(names),
        "" if len(names) == 1 else "s",
        ", ".join(names[:8]) + (", …" if len(names) > 8 else ""),
        allowed,
    )
