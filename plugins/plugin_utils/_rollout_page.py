# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""A rollout as one HTML page: every host on one axis of time, what came of it and why, and the requests meanwhile."""

from __future__ import annotations

import os
import time
import typing as t

import jinja2
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_looks import (
    WAY_BACK,
    out_of_service,
    seconds_text,
    steps_of,
)

_TITLES = {"driver_upgrade": "Driver upgrade", "nim_deploy": "Deployment of models"}
_TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "playbooks", "templates")

#: Steps as the page tells them: words and the colour of their part of the bar.
STEPS = {
    "planned": ("recorded", "none"),
    "prestaged": ("downloads", "none"),
    "drained": ("drain", "reload"),
    "workloads_stopped": ("services stop", "restart_nim"),
    "clients_stopped": ("daemons stop", "restart_nim"),
    "unloaded": ("unload", "unload_driver"),
    "packages_changed": ("packages", "unload_driver"),
    "loaded": ("load", "unload_driver"),
    "validated": ("validation", "good"),
    "workloads_started": ("services start", "good"),
    "changed": ("services change", "restart_nim"),
    "ready": ("until ready", "good"),
    "returned": ("return", "good"),
    WAY_BACK: ("way back", "bad"),
}
_TONES = {
    "updated": "good",
    "as wanted": "good",
    "restored": "warn",
    "rolled back": "warn",
    "out of service": "bad",
    "refused": "bad",
    "unreachable": "bad",
}
#: Steps that are no part of the time in which a host is out of service.
_BEFORE = ("planned", "prestaged")


class Bar(t.NamedTuple):
    """A part of a host's line; ``left`` and ``width`` in percent of the axis."""

    tone: str
    left: float
    width: float
    title: str


def bars_of(steps: t.Sequence[t.Mapping[str, t.Any]], start: float, end: float) -> list[Bar]:
    """The parts of one line. Between two steps the host waits, for a drain or a reboot: that belongs to the earlier one."""
    span = max(end - start, 1.0)
    known = sorted((step for step in steps if step["step"] in STEPS), key=lambda step: float(step["at"]))
    found = []
    for number, step in enumerate(known):
        words, tone = STEPS[str(step["step"])]
        began, finished = step["at"], step["at"] + step["seconds"]
        if number + 1 < len(known):
            finished = max(finished, known[number + 1]["at"])
        title = "%s: %s" % (words, seconds_text(finished - began))
        if finished < start:
            continue
        # What an earlier run has left out was taken out long before.
        left = max(began, start)
        width = 100 * (finished - left) / span
        found.append(Bar(tone, 100 * (left - start) / span, max(width, 0.15), title))
    return found


def render_page(
    kind: str,
    hosts: t.Sequence[t.Mapping[str, t.Any]],
    plan: t.Mapping[str, t.Any],
    when: str,
    *,
    traffic: t.Mapping[str, t.Any] | None = None,
    said: t.Sequence[str] = (),
    begun: float = 0.0,
) -> str:
    """The page.

    Args:
        kind: ``driver_upgrade`` or ``nim_deploy``.
        hosts: ``name``, ``outcome``, ``message``, ``record`` (as on the host) and ``models`` of each host.
        plan: The plan of the fleet as a mapping.
        when: The time to print.
        traffic: Requests at the gateways, as :meth:`Traffic.as_dict` gives them.
        said: The same in words.
        begun: When the run began, in seconds since the epoch: what was before would squeeze it on the axis.
    """
    records = {
        # Downloads were before the run, too.
        str(host["name"]): [step for step in steps_of(host["record"] or {}) if step["step"] not in _BEFORE]
        for host in hosts
    }
    moments = [(step["at"], step["at"] + step["seconds"]) for steps in records.values() for step in steps]
    start, end = (
        (min(began for began, _end in moments), max(last for _began, last in moments)) if moments else (0.0, 1.0)
    )
    if start < begun < end:
        start = begun
    lines = []
    for host in hosts:
        steps = records[str(host["name"])]
        record = host["record"] or {}
        lines.append(
            {
                "name": host["name"],
                "outcome": host["outcome"],
                "tone": _TONES.get(str(host["outcome"]), "idle"),
                "message": host["message"],
                "models": ", ".join(host["models"]),
                "target": _target(record),
                "bars": bars_of(steps, start, end),
                "out": seconds_text(out_of_service(record)) if out_of_service(record) else "",
            }
        )
    counted = {
        word: sum(line["outcome"] == word for line in lines)
        for word in dict.fromkeys(line["outcome"] for line in lines)
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("rollout_report.html.j2").render(
        title=_TITLES[kind],
        traffic=traffic or {},
        said=said,
        when=when,
        lines=lines,
        counted=[(word, count, _TONES.get(str(word), "idle")) for word, count in counted.items()],
        plan=plan,
        ticks=_ticks(start, end) if moments else [],
        legend=[
            (tone, words) for tone, words in _LEGEND.items() if kind == "driver_upgrade" or tone != "unload_driver"
        ],
    )


_LEGEND = {
    "reload": "drain",
    "restart_nim": "services stop or change",
    "unload_driver": "driver changes",
    "good": "validation and services until ready",
    "bad": "way back",
}


def _target(record: t.Mapping[str, t.Any]) -> str:
    before = record.get("before")
    old = str((before.get("version") if isinstance(before, dict) else before) or "none")
    return "%s → %s" % (old, record.get("target") or "") if record else ""


def _ticks(start: float, end: float) -> list[tuple[float, str]]:
    """Five moments on the axis: percent, and time of the day in UTC."""
    span = max(end - start, 1.0)
    return [(25.0 * number, time.strftime("%H:%M:%S", time.gmtime(start + span * number / 4))) for number in range(5)]
