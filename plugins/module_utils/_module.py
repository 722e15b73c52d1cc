# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The thin shell between AnsibleModule and a resource."""

from __future__ import annotations

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ._errors import FleetError
from ._host import Host
from ._redaction import scrub, scrub_data
from ._resource import Change, OnChange, Resource, converge

S = t.TypeVar("S")


def masked(answer: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return values without whatever looks like a secret: what tools and daemons said may hold the password of a proxy or mirror.

    Their names are our own and say nothing; names further inside may come from anywhere and count.
    """
    return {name: scrub_data(value) for name, value in answer.items()}


def fail(module: AnsibleModule, error: FleetError) -> t.NoReturn:
    """End the module with the sentence, the reason and the facts of an expected error."""
    facts = masked(error.facts)
    changes = facts.pop("changes", [])
    module.fail_json(msg=scrub(error.message), reason=error.reason, changed=bool(changes), changes=changes, **facts)
    raise AssertionError("fail_json returned")


def succeed(module: AnsibleModule, answer: t.Mapping[str, t.Any], warnings: t.Iterable[str] = ()) -> t.NoReturn:
    """End a module that only looks, with what it found."""
    for warning in warnings:
        module.warn(scrub(warning))
    module.exit_json(changed=False, **masked(answer))
    raise AssertionError("exit_json returned")


def returned_changes(changes: t.Iterable[Change]) -> list[dict[str, t.Any]]:
    """Changes as a module returns them."""
    return [masked(change.as_dict()) for change in changes]


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
        for lines, value in ((before, scrub_data(change.before)), (after, scrub_data(change.after))):
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
        answer = converged(module, build(), result, host)
    except FleetError as error:
        fail(module, error)
    module.exit_json(**answer)
    raise AssertionError("exit_json returned")


def converged(
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
        left_out = ("%s: %s was left out: %s" % (one.resource, one.what, one.blocked) for one in outcome.blocked)
        answer["msg"] = scrub("; ".join(left_out))
    return dict(
        answer,
        changed=outcome.changed,
        changes=returned_changes(outcome.changes),
        blocked=returned_changes(outcome.blocked),
        diff=render_diff(outcome.changes) if module._diff else [],
    )
