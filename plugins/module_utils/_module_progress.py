# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The shell between AnsibleModule and a resource that takes its time: a job on the host, with progress."""

from __future__ import annotations

import time
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ._background import DONE, Jobs, Report
from ._errors import FleetError
from ._host import Host
from ._module import converged, fail, run_resource
from ._redaction import scrub
from ._resource import Change, Resource

S = t.TypeVar("S")

#: Options of modules that call :func:`run_resource_with_progress`; documented in the fragment ``progress``.
PROGRESS_OPTIONS: dict[str, t.Any] = {
    "progress_interval": {"type": "int", "default": 5},
    "resume": {"type": "dict"},
}


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

                resource.tell = lambda text: report({"text": text})  # type: ignore[method-assign]  # one listener, this one
                return converged(module, resource, result, host, tell)

            own = jobs.start(resource.name, work)
        status = jobs.wait([resource.name], interval)[0]
        if status.finished and own and status.state != DONE:
            raise status.failure("Changing %s" % resource.name)
    except FleetError as error:
        fail(module, error)
    if status.finished and own:
        module.exit_json(finished=True, **status.result)
    text = "%s, %d s" % (scrub(str(status.progress.get("text") or resource.name)), time.time() - status.started)
    # Somebody else's work may have had another aim: when it has ended, everything is looked at anew.
    module.exit_json(
        changed=False, finished=False, progress={"text": text}, resume={} if status.finished else {"own": own}
    )
    raise AssertionError("exit_json returned")
