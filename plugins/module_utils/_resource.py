# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Observe, plan, apply, verify: the four steps that every managed thing shares."""

from __future__ import annotations

import abc
import enum
import typing as t
from dataclasses import dataclass, field

from ._errors import FleetError
from ._host import Host

S = t.TypeVar("S")


class Disruption(enum.IntEnum):
    """What a change does to the services of the host, least first."""

    NONE = 0
    RELOAD = 1
    RESTART_DOCKER = 2
    RESTART_NIM = 3
    UNLOAD_DRIVER = 4
    REBOOT = 5

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class FileDiff:
    """Content of a file before and after, for Ansible's diff; secrets are replaced by fingerprints beforehand."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class Change:
    """One difference between what is wanted and what is.

    Attributes:
        resource: Name of the resource, equal to the module that manages it.
        what: The part that differs, in the user's words: ``package cuda-drivers-580``, ``/etc/docker/daemon.json``.
        before: Present value in a form that can be printed; None means absent.
        after: Wanted value in a form that can be printed; None means absent.
        why: Why this change is needed, one clause.
        disruption: What applying it does to running services.
        action: Stable identifier that ``apply`` dispatches on; a resource's own affair.
        data: What ``apply`` needs beyond the above; never printed, so it may hold secrets.
        diff: Textual difference of a file, if the change writes one.
        blocked: Set when this run must not apply the change; says why and what would allow it.
        proof: Set when it is only a test that leaves the host as it is; a run that does nothing else changes nothing.
    """

    resource: str
    what: str
    before: t.Any
    after: t.Any
    why: str
    disruption: Disruption = Disruption.NONE
    action: str = ""
    data: t.Mapping[str, t.Any] = field(default_factory=dict, compare=False, repr=False)
    diff: FileDiff | None = field(default=None, compare=False, repr=False)
    blocked: str | None = None
    proof: bool = False

    def as_dict(self) -> dict[str, t.Any]:
        """The change as modules return it and as the plan prints it."""
        return {
            "resource": self.resource,
            "what": self.what,
            "from": self.before,
            "to": self.after,
            "why": self.why,
            "disruption": str(self.disruption),
            "blocked": self.blocked,
        }


class Planner(abc.ABC, t.Generic[S]):
    """What is wanted of one thing, and how a host differs from it. Subclasses keep what is wanted in ``self``, validated in
    their constructor.

    ``plan`` is pure: same wanted and same state give the same changes, and it touches nothing.
    """

    name: t.ClassVar[str] = ""

    def tell(self, text: str) -> None:
        """A line about what is being done within a change, for whoever watches; replaced by who listens."""

    @abc.abstractmethod
    def observe(self, host: Host) -> S:
        """Look at the host. Never changes it, starts a container, loads a module or contacts a registry."""

    @abc.abstractmethod
    def plan(self, state: S) -> list[Change]:
        """All changes that lead from ``state`` to what is wanted, in the order in which they must be applied."""


class Resource(Planner[S]):
    """One managed thing: a planner that can also carry out what it plans.

    Large ones have the planner in a file of its own, for the plan of a host, which carries out nothing.
    """

    @abc.abstractmethod
    def apply(self, host: Host, change: Change) -> None:
        """Carry out one change; looks at reality first and does nothing when it already is so."""


@dataclass
class Outcome(t.Generic[S]):
    """What :func:`converge` did: the last look, what was (or would be) changed, and what had to be left."""

    state: S
    changes: list[Change]
    blocked: list[Change]

    @property
    def changed(self) -> bool:
        return any(not change.proof for change in self.changes)


#: Told before each change is applied: its number from 1, how many there are, and the change.
OnChange = t.Callable[[int, int, Change], None]


def converge(host: Host, resource: Resource[S], *, check_mode: bool, on_change: OnChange | None = None) -> Outcome[S]:
    """Observe, plan, apply and verify one resource.

    Raises:
        FleetError: As the resource raises it, with ``changes`` (those applied so far) added to its facts;
            ``not_converged`` when the second look still sees differences that nothing explains.
    """
    state = resource.observe(host)
    planned = resource.plan(state)
    blocked = [change for change in planned if change.blocked]
    todo = [change for change in planned if not change.blocked]
    if check_mode or not todo:
        return Outcome(state, todo, blocked)

    applied: list[Change] = []
    try:
        for number, change in enumerate(todo, 1):
            # Counted before it is tried: half an application is a change too.
            applied.append(change)
            if on_change is not None:
                on_change(number, len(todo), change)
            resource.apply(host, change)
        state = resource.observe(host)
        planned = resource.plan(state)
    except FleetError as error:
        error.facts.setdefault("changes", [change.as_dict() for change in applied])
        raise
    remaining = [change for change in planned if not change.blocked]
    if remaining:
        first = remaining[0]
        raise FleetError(
            "not_converged",
            "%s was applied, but a second look still finds %s = %r where %r is wanted (%s); "
            "look for another tool that manages the same thing."
            % (resource.name, first.what, first.before, first.after, first.why),
            changes=[change.as_dict() for change in applied],
            remaining=[change.as_dict() for change in remaining],
        )
    return Outcome(state, applied, [change for change in planned if change.blocked])
