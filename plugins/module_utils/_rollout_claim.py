# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The word of a run on a host that waits for its turn, renewed or given up; nothing else of the host's record is touched."""

from __future__ import annotations

import json
import typing as t
from dataclasses import dataclass, field

from ._errors import FleetError
from ._host import Host
from ._resource import Change, Resource
from ._rollout_record import RECORDS, refuse_other
from ._untrusted import json_object, real_number

#: Kind of rollout -> its record.
PATHS = {"driver_upgrade": "/var/lib/gpu_fleet/driver-upgrade.json", "nim_deploy": "/var/lib/gpu_fleet/nim-deploy.json"}
STATES = ("present", "absent")


@dataclass(frozen=True)
class ClaimState:
    """Who is at the host.

    Attributes:
        claims: Path of a record -> the claim in it; only records that are there.
        now: When it was looked at, in seconds since the epoch.
    """

    claims: t.Mapping[str, t.Mapping[str, t.Any]] = field(default_factory=dict)
    now: float = 0.0


class RolloutClaim(Resource[ClaimState]):
    """The word of a run on a host.

    Args:
        kind: Whose record, one of :data:`PATHS`.
        run: Who is at it, in words.
        state: ``present`` renews it, where the run's look has left a record; ``absent`` gives it up.
        lease: Seconds that it counts without another sign of life; it is renewed when half of them are over.
        take_over: Honour no other run.

    Raises:
        FleetError: ``invalid_option``.
    """

    name = "rollout_claim"

    def __init__(
        self, *, kind: str, run: str, state: str = "present", lease: int = 3600, take_over: bool = False
    ) -> None:
        if not run:
            raise FleetError("invalid_option", "run = '': nobody can be named; say who it is.")
        if lease < 1:
            raise FleetError(
                "invalid_option", "lease = %d: it would count for nothing; give at least 1 second." % lease
            )
        self.path = PATHS[kind]
        self.run = run
        self.state = state
        self.lease = lease
        self.take_over = take_over

    def observe(self, host: Host) -> ClaimState:
        found = {}
        for path in RECORDS:
            # A record that is broken is reported by whoever takes the host out.
            record = json_object(host.read_text(path))
            if record:
                claim = record.get("claim")
                found[path] = claim if isinstance(claim, dict) else {}
        return ClaimState(found, host.time())

    def plan(self, state: ClaimState) -> list[Change]:
        claim = state.claims.get(self.path)
        if claim is None:
            return []
        ours = claim.get("run") == self.run
        if self.state == "absent":
            why = "its run has ended"
            return [Change(self.name, "claim", self.run, None, why, action="release")] if ours else []
        for path, other in state.claims.items():
            # The look that left our word has judged what was there before, and may have been told to take over.
            judged = ours and path != self.path and real_number(other.get("seen")) <= real_number(claim.get("seen"))
            if not self.take_over and not judged:
                refuse_other(other, self.run, state.now, RECORDS[path])
        lease = real_number(claim.get("lease"))
        if ours and lease >= self.lease and 0 <= state.now - real_number(claim.get("seen")) < lease / 2:
            return []
        why = "the host waits for its turn"
        return [Change(self.name, "claim", str(claim.get("run") or "") or None, self.run, why, action="claim")]

    def apply(self, host: Host, change: Change) -> None:
        record = json_object(host.read_text(self.path))
        if not record:
            return
        claim = {"run": self.run, "seen": round(host.time(), 1), "lease": self.lease}
        record["claim"] = claim if change.action == "claim" else {}
        host.write_file(self.path, json.dumps(record, sort_keys=True) + "\n", mode=0o644)

    def result(self, state: ClaimState) -> dict[str, t.Any]:
        """Return values of the module."""
        return {"claim": dict(state.claims.get(self.path) or {})}
