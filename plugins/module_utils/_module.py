# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The thin shell between AnsibleModule and a resource."""

from __future__ import annotations

import time
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ._background import DONE, Jobs, Report
from ._errors import FleetError
from ._host import Host
from ._resource import Change, OnChange, Resource, converge

S = t.TypeVar("S")

#: Options of modules that call :func:`run_resource_with_progress`; documented in the fragment ``progress``.
PROGRESS_OPTIONS: dict[str, t.Any] = {
    "progress_interval": {"type": "int", "default": 5},
    "resume": {"type": "dict"},
}


def fail(module: AnsibleModule, error: FleetError) -> t.NoReturn:
    """End the module with the sentence, the reason and the facts of an expected error."""
    facts = dict(error.facts)
    changes = facts.pop("changes", [])
    module.fail_json(msg=error.message, reason=error.reason, changed=bool(changes), changes=changes, **facts)
    raise AssertionError("fail_json returned")


def render_diff(changes: t.Sequence[Change]) -> list[dict[str, str]]:
    """Ansible's diff structure: one entry a file, and one that lists all other differences as lines."""
    entries: list[dict[str, str]] = []
    before: list[str] = []
    after: list[str] = []
    for change in changes:
        if change.diff is not None:
            entries.append(
                {
                    "before_header": change.diff.path,
                    "after_header": change.diff.path,
                    "before": change.diff.before,
                    "after": change.diff.after,
                }
            )
            continue
        for lines, value in ((before, change.before), (after, change.after)):
            if value is not None:
                lines.append("%s: %s\n" % (change.what, value))
    if before or after:
        name = changes[0].resource
        entries.append(
            {"before_header": name, "after_header": name, "before": "".join(before), "after": "".join(after)}
        )
    return entries


def run_resource(
    module: AnsibleModule,
    build: t.Callable[[], Resource[S]],
    result: t.Callable[[S], dict[str, t.Any]],
    *,
    host: Host | None = None,
) -> t.NoReturn:
    """Validate, observe, plan, apply, verify, answer.

    Args:
        build: Makes the resource out of ``module.params``; every option is validated here, before the first look.
        result: Turns the last observed state into the module's own return values.
    """
    host = host or Host()
    try:
        answer = _converged(module, build(), result, host)
    except FleetError as error:
        fail(module, error)
    module.exit_json(**answer)
    raise AssertionError("exit_json returned")


def _converged(
    module: AnsibleModule,
    resource: Resource[S],
    result: t.Callable[[S], dict[str, t.Any]],
    host: Host,
    on_change: OnChange | None = None,
) -> dict[str, t.Any]:
    """Converge a resource and put together what the module returns."""
    outcome = converge(host, resource, check_mode=module.check_mode, on_change=on_change)
    answer = result(outcome.state)
    if outcome.blocked:
        # Read by people when a task is failed because of it.
        answer["msg"] = "; ".join("%s: %s was left out: %s" % (c.resource, c.what, c.blocked) for c in outcome.blocked)
    return dict(
        answer,
        changed=outcome.changed,
        changes=[change.as_dict() for change in outcome.changes],
        blocked=[change.as_dict() for change in outcome.blocked],
        diff=render_diff(outcome.changes) if module._diff else [],
    )


def own_options(module: AnsibleModule) -> dict[str, t.Any]:
    """The module's options without those of the progress protocol."""
    return {name: value for name, value in module.params.items() if name not in PROGRESS_OPTIONS}


def run_resource_with_progress(
    module: AnsibleModule,
    build: t.Callable[[], Resource[S]],
    result: t.Callable[[S], dict[str, t.Any]],
) -> t.NoReturn:
    """As :func:`run_resource`, for work that takes longer than people like to look at nothing.

    Where something must change, a job on the host does it: it goes on when the connection breaks, and the next run
    waits for it. The module returns every ``progress_interval`` seconds, for the action plugin of the same name to show
    a line. With ``progress_interval: 0``, in check mode and where nothing is to be done it is plain ``run_resource``.
    """
    interval = module.params["progress_interval"]
    if interval == 0 or module.check_mode:
        run_resource(module, build, result)
    host, jobs = Host(), Jobs()
    own = (module.params["resume"] or {}).get("own")
    try:
        # Bad options are told before anything else.
        resource = build()
        if own is None:
            if all(change.blocked for change in resource.plan(resource.observe(host))):
                run_resource(module, lambda: resource, result)

            def work(report: Report) -> dict[str, t.Any]:
                def tell(number: int, of: int, change: Change) -> None:
                    report({"text": "%s: %s (step %d of %d)" % (change.what, change.why, number, of)})

                return _converged(module, resource, result, host, tell)

            own = jobs.start(resource.name, work)
        status = jobs.wait([resource.name], interval)[0]
        if status.finished and own and status.state != DONE:
            raise status.failure("Changing %s" % resource.name)
    except FleetError as error:
        fail(module, error)
    if status.finished and own:
        module.exit_json(finished=True, **status.result)
    text = "%s, %d s" % (status.progress.get("text") or resource.name, time.time() - status.started)
    # Somebody else's work may have had another aim: when it has ended, everything is looked at anew.
    module.exit_json(
        changed=False, finished=False, progress={"text": text}, resume={} if status.finished else {"own": own}
    )
    raise AssertionError("exit_json returned")
