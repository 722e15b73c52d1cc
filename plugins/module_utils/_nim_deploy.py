# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Other images or settings for the models of one host that serves: from services that run what was wanted before to services that
are ready with what is wanted now.

A resource like the others, whose changes are the steps that are left. What is changed is what the resource of the NIM services
changes anyway; here stands what is remembered, and the way back: the files of before, and services started with them, by the
digest of before.
"""

from __future__ import annotations

import contextlib
import typing as t
from dataclasses import replace

from ._driver_upgrade_record import maintenance
from ._errors import FleetError
from ._host import Host
from ._nim_deploy_planner import STEPS, DeployPlanner, DeployRecord, DeployState
from ._nim_deploy_snapshot import Snapshot
from ._nim_service_work import ServiceWork
from ._resource import Change, Resource, converge
from ._rollout_record import (
    RESTORED,
    ROLLED_BACK,
    STRANDED,
    UPDATED,
    claimed,
    failed,
    finished,
    foreseen,
    note,
    read,
    released,
    taken_away,
    went_back,
    with_signs_of_life,
    write,
)
from ._rollout_services import (
    Service,
    observe_own,
    serving,
    start_services,
    stop_services,
    wait_ready,
)


class NimDeploy(DeployPlanner, Resource[DeployState]):
    """What is wanted of the services of a host, brought about while it is out of service; options as for :class:`DeployPlanner`."""

    # -- apply

    def apply(self, host: Host, change: Change) -> None:
        step = change.action
        began = host.time()
        state = self._look(host)
        record = claimed(state.record or DeployRecord(), self.run, began, lease=self.lease, take_over=self.take_over)
        if state.held and record.open and step != "restored":
            raise taken_away(DeployRecord, state.held)
        try:
            record = getattr(self, "_step_" + step)(host, state, record)
            write(host, finished(record, step, host.time(), began) if step in STEPS else record)
        except Exception as error:
            # Even a defect must not leave the services stopped.
            known = foreseen("Step %s of the deployment" % step, error)
            raise self._failed(host, step, state, began, known) from error

    # -- steps; each returns the record as it is after it

    def _step_planned(self, host: Host, state: DeployState, record: DeployRecord) -> DeployRecord:
        digest, (runs, target) = self.digest(state), self._words(state)
        if record.digest == digest and not record.outcome:
            # Known, and under way: only who is at it is new.
            return record
        if record.open:
            # Another target, or another try: what ran before is still what has to be put back if it fails.
            return replace(record, digest=digest, target=target, step="drained", outcome="")
        Snapshot.forget(host)
        return DeployRecord(
            digest=digest,
            target=target,
            started=round(host.time(), 1),
            before=runs,
            claim=record.claim,
            workloads=tuple(service.name for service in state.own if service.active),
        )

    def _step_prestaged(self, _host: Host, state: DeployState, record: DeployRecord) -> DeployRecord:
        self._refuse(state)
        for change in state.changes:
            if change.action == "prerequisite":
                raise FleetError(str(change.data["reason"]), str(change.data["message"]))
        return record

    def _step_drained(self, host: Host, state: DeployState, record: DeployRecord) -> DeployRecord:
        # The load balancer is the caller's; what counts here is that a lost run is known to have begun.
        ready = record.serving if record.open else serving(host, self.api, state.own)
        return replace(record, outcome="", serving=ready)

    def _step_changed(self, host: Host, state: DeployState, record: DeployRecord) -> DeployRecord:
        # Before the first file is written: who goes on must know what is to be put back.
        if not Snapshot.exists(host):
            running = {service.name for service in state.own if service.active}
            # It may have been planned long ago.
            record = write(host, replace(record, workloads=tuple(sorted({*record.workloads, *running}))))
            Snapshot.take(host, [*(service.name for service in state.own), *(model.name for model in self.models)])
        outcome = converge(
            host, self.services, check_mode=False, on_change=lambda _number, _of, change: self.tell(change.what)
        )
        if outcome.blocked:
            raise FleetError("maintenance", str(outcome.blocked[0].blocked))
        return record

    def _step_ready(self, host: Host, state: DeployState, record: DeployRecord) -> DeployRecord:
        self._wait(host, state.own, self.started, self.entries)
        return record

    def _wait(
        self, host: Host, services: t.Sequence[Service], names: t.Sequence[str], entries: t.Sequence[t.Any]
    ) -> None:
        tell = with_signs_of_life(host, DeployRecord, self.run, self.lease, self.tell)
        wait_ready(host, self.api, services, names, entries, tell)

    @staticmethod
    def _step_returned(host: Host, _state: DeployState, record: DeployRecord) -> DeployRecord:
        Snapshot.forget(host)
        return released(replace(record, outcome=UPDATED, failure={}))

    def _step_restored(self, host: Host, state: DeployState, record: DeployRecord) -> DeployRecord:
        if Snapshot.exists(host):
            raise FleetError(
                "not_restorable",
                "The models of this host have been changed already, so their deployment cannot just be given up; run it again, "
                "or deploy what is wanted.",
            )
        # One that was about to get ready when it was drained gets its requests back, too.
        ready = {*record.serving, *serving(host, self.api, state.own)}
        return released(replace(record, outcome=RESTORED, serving=tuple(sorted(ready))))

    # -- the way back

    def _failed(self, host: Host, step: str, state: DeployState, began: float, error: FleetError) -> FleetError:
        """The error of a step, after the host was brought back into service where that is possible."""
        record = read(host, DeployRecord)
        if record is None or error.reason == "upgrade_running":
            return error
        failure = failed(step, error, began, host.time())
        record = note(host, replace(record, failure=failure))
        # A look comes before any turn, and who asked for it cannot give the host its requests back. In the last step it has them.
        if self.goal == "prestaged" or not record.open or step not in STEPS[:-1]:
            return error
        held = replace(state, maintenance=maintenance(host)).held
        if held:
            # Perhaps it failed for that; and nothing is started, or given requests, behind the back of whoever it is.
            away = taken_away(DeployRecord, held)
            error.reason, error.message = away.reason, "%s. %s" % (error.message.rstrip("."), away.message)
            return error
        try:
            snapshot = Snapshot.read(host)
            if snapshot is None:
                outcome, said = RESTORED, "Its models were left as they were"
            else:
                outcome, said = ROLLED_BACK, "What ran before (%s) was put back" % (record.before or "nothing")
                self.tell("going back to %s" % (record.before or "nothing"))
                self._roll_back(host, snapshot, record)
            own = observe_own(host)
            self._wait(host, own, record.awaited, ())
            ready = {*record.serving, *serving(host, self.api, own)}
        except Exception as caught:
            second = foreseen("It", caught)
            left = replace(read(host, DeployRecord) or record, failure=failure)
            record = note(host, went_back(left, STRANDED, host.time()))
            error.message = (
                "%s. Going back to %s failed too (%s): the host stays out of service, and running again goes on where it is."
                % (error.message.rstrip("."), record.before or "nothing", second.message.rstrip("."))
            )
            error.facts.update(outcome=STRANDED, step=step, record=record.as_dict())
            return error
        with contextlib.suppress(FleetError):
            # On a disk that has become read-only; a deployment forgets it before it begins, too.
            Snapshot.forget(host)
        left = replace(read(host, DeployRecord) or record, failure=failure, serving=tuple(sorted(ready)))
        record = note(host, released(went_back(left, outcome, host.time())))
        error.message = "%s. %s and answers." % (error.message.rstrip("."), said)
        error.facts.update(outcome=outcome, step=step, record=record.as_dict())
        return error

    def _roll_back(self, host: Host, snapshot: Snapshot, record: DeployRecord) -> None:
        """The files of before, and services that run with them.

        Raises:
            FleetError: When that is not possible.
        """
        other = snapshot.different(host)
        services = [service for service in observe_own(host) if service.name in other]
        stop_services(host, self.api, services)
        work = ServiceWork(self.api, None)
        for name in other:
            if not snapshot.had(name):
                work.remove(host, name)
        snapshot.restore(host, [name for name in other if snapshot.had(name)])
        start_services(host, observe_own(host), record.workloads)
