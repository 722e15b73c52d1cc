# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Images in slices of some seconds, with the pulls in the background; and what check mode says of them."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from ._background import FAILED, LOST, RUNNING, Jobs, JobStatus
from ._errors import FleetError
from ._host import Host
from ._image_pull import progress_text
from ._nim_image import NimImages, pull_job_id
from ._nim_image_planner import ImagesState
from ._resource import Change


@dataclass
class Slice:
    """What one call of the module did.

    Attributes:
        state: The last look; None while not ``finished``.
        changes: All changes since the first call.
        progress: For the controller while not ``finished``.
        resume: What the next call needs.
    """

    finished: bool
    state: t.Optional[ImagesState]
    changes: t.List[Change]
    blocked: t.List[Change]
    progress: t.Dict[str, t.Any]
    resume: t.Dict[str, t.Any]


def advance(
    host: Host, resource: NimImages, resume: t.Optional[t.Mapping[str, t.Any]], seconds: t.Optional[float]
) -> Slice:
    """Take the images as far as possible in some seconds (None = to the end).

    Every call looks at the host anew; ``resume`` only tells what earlier calls of the same task have changed and which
    jobs they wait for, so that a task that was cut off is taken up by the next one.

    Raises:
        FleetError: With ``changes`` in its facts.
    """
    resume = resume or {}
    done = [_change_from(entry) for entry in resume.get("changes") or []]
    waited_for: t.List[str] = list(resume.get("jobs") or [])
    applied: t.Set[str] = set()
    try:
        while True:
            # While a job of ours runs there is nothing else to look at.
            statuses = resource.jobs.wait(waited_for, seconds)
            if any(status.state == RUNNING for status in statuses) and not _failed(statuses):
                return Slice(
                    False,
                    None,
                    done,
                    [],
                    _progress(statuses),
                    {"jobs": waited_for, "changes": [change.as_dict() for change in done]},
                )
            state = resource.observe(host)
            planned = resource.plan(state)
            todo = [change for change in planned if not change.blocked]
            pulls = [change for change in todo if change.action == "pull"]
            _raise_failures(resource.jobs, waited_for, pulls)
            if not todo:
                return Slice(True, state, done, [change for change in planned if change.blocked], {}, {})

            attached, fresh = _running(resource.jobs, pulls)
            # All checks before the first change: a list of images is refused as a whole.
            pins = [change for change in todo if change.action == "pin"]
            tasks = resource.preflight(host, fresh + pins) if fresh or pins else []
            for change in todo:
                if change.action == "pull":
                    continue
                if change.what in applied:
                    raise _not_converged(change.what)
                applied.add(change.what)
                done.append(change)
                resource.apply(host, change)
            for change, status in attached:
                done.append(replace(change, after=status.progress.get("digest") or change.after))
                waited_for.append(status.job_id)
            for change, task in zip(fresh, tasks):
                done.append(replace(change, after=task.found.digest))
                waited_for.append(task.job_id)
                resource.start(host, task)
    except FleetError as error:
        error.facts.setdefault("changes", [change.as_dict() for change in done])
        raise


def _not_converged(what: str) -> FleetError:
    return FleetError(
        "not_converged",
        "%s was dealt with, but a second look finds it undone; look for another program that manages images." % what,
    )


#: What keeps a check from being made where the host is not ready yet; in check mode an earlier task may be what mends it.
_NOT_READY = frozenset(("no_key", "registry_unreachable", "tls_error", "docker_unavailable", "no_such_user"))
#: What an earlier task may mend that check mode has not carried out.
_MENDABLE = frozenset(("requirement", "disk_full", "engine_cannot_pull", "engine_too_old"))


@dataclass
class Forecast:
    """What a run would do, for check mode."""

    state: ImagesState
    changes: t.List[Change]
    blocked: t.List[Change]
    warnings: t.List[str]


def forecast(host: Host, resource: NimImages) -> Forecast:
    """The plan, with the checks before the pull made as far as the host allows.

    Raises:
        FleetError: What would also stop a real run, whatever earlier tasks of it do: a refusal by the registry.
    """
    state = resource.observe(host)
    planned = resource.plan(state)
    found = Forecast(
        state,
        [change for change in planned if not change.blocked],
        [change for change in planned if change.blocked],
        [],
    )
    pulls = [change for change in found.changes if change.action == "pull"]
    fresh = _running(resource.jobs, pulls)[1] + [change for change in found.changes if change.action == "pin"]
    if not fresh:
        return found
    try:
        tasks = resource.preflight(host, fresh)
    except FleetError as error:
        if error.reason in _NOT_READY:
            found.warnings.append("Not checked before the pull: %s" % error.message)
        elif error.reason in _MENDABLE:
            found.changes = [change for change in found.changes if change not in fresh]
            found.blocked += [replace(change, blocked=error.message) for change in fresh]
        else:
            raise
        return found
    resolved = {str(task.wanted.reference): task.found.digest for task in tasks}
    found.changes = [
        replace(change, after=resolved.get(str(change.data["image"].wanted.reference), change.after))
        for change in found.changes
    ]
    return found


def _failed(statuses: t.Sequence[JobStatus]) -> bool:
    return any(status.state in (FAILED, LOST) for status in statuses)


def _raise_failures(jobs: Jobs, waited_for: t.Sequence[str], pulls: t.Sequence[Change]) -> None:
    """A job of ours that has ended while its image is still missing has failed."""
    names = {pull_job_id(change.data["image"].wanted.reference): change for change in pulls}
    for job_id in waited_for:
        status = jobs.read(job_id)
        if job_id not in names or (status is not None and status.state == RUNNING):
            continue
        image = str(names[job_id].data["image"].wanted.reference)
        if status is None or status.state != "done":
            raise (status or JobStatus(job_id, LOST)).failure("Pulling %s" % image)
        raise _not_converged("image %s" % image)


def _running(jobs: Jobs, pulls: t.Sequence[Change]) -> t.Tuple[t.List[t.Tuple[Change, JobStatus]], t.List[Change]]:
    """Pulls that are under way, whoever began them, and those that have to be started."""
    attached, fresh = [], []
    for change in pulls:
        status = jobs.read(pull_job_id(change.data["image"].wanted.reference))
        if status is not None and status.state == RUNNING:
            attached.append((change, status))
        else:
            fresh.append(change)
    return attached, fresh


def _progress(statuses: t.Sequence[JobStatus]) -> t.Dict[str, t.Any]:
    running = [status for status in statuses if status.state == RUNNING]
    texts = [progress_text(str(status.progress.get("name", "image")), status.progress) for status in running]
    return {
        "text": "; ".join(texts),
        "pulls": [status.progress for status in running],
    }


def _change_from(entry: t.Mapping[str, t.Any]) -> Change:
    return Change(NimImages.name, str(entry["what"]), entry.get("from"), entry.get("to"), str(entry["why"]))
