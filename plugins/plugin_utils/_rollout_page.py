# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""A driver upgrade as one HTML page: every host on one axis of time, what came of it, and why."""

from __future__ import annotations

import os
import time
import typing as t

import jinja2

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
    "ready": ("until ready", "good"),
    "returned": ("return", "good"),
}
_TONES = {
    "upgraded": "good",
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
    known = sorted(
        (step for step in steps if step.get("step") in STEPS and isinstance(step.get("at"), (int, float))),
        key=lambda step: float(step["at"]),
    )
    found = []
    for number, step in enumerate(known):
        words, tone = STEPS[str(step["step"])]
        began = float(step["at"])
        finished = began + float(step.get("seconds") or 0)
        if number + 1 < len(known) and step["step"] not in _BEFORE:
            finished = max(finished, float(known[number + 1]["at"]))
        width = 100 * (finished - began) / span
        title = "%s: %s" % (words, seconds_text(finished - began))
        found.append(Bar(tone, 100 * (began - start) / span, max(width, 0.15), title))
    return found


def seconds_text(seconds: float) -> str:
    """``42 s``, ``3 min 5 s``, ``1 h 2 min``."""
    whole = round(seconds)
    if whole < 60:
        return "%d s" % whole
    if whole < 3600:
        return "%d min %d s" % divmod(whole, 60)
    return "%d h %d min" % (whole // 3600, whole % 3600 // 60)


def _out_of_service(steps: t.Sequence[t.Mapping[str, t.Any]]) -> float:
    """Seconds between the drain and the return, or the last step that is known."""
    times = {str(step.get("step")): step for step in steps}
    if "drained" not in times:
        return 0.0
    last = max(float(step.get("at") or 0) + float(step.get("seconds") or 0) for step in steps)
    return max(0.0, last - float(times["drained"].get("at") or 0))


def render_page(hosts: t.Sequence[t.Mapping[str, t.Any]], plan: t.Mapping[str, t.Any], when: str) -> str:
    """The page.

    Args:
        hosts: ``name``, ``outcome``, ``message``, ``record`` (as on the host) and ``models`` of each host.
        plan: The plan of the fleet as a mapping.
        when: The time to print.
    """
    records = {str(host["name"]): list((host["record"] or {}).get("steps") or []) for host in hosts}
    # Downloads were before the run, and would squeeze it.
    moments = [
        (float(step["at"]), float(step["at"]) + float(step.get("seconds") or 0))
        for steps in records.values()
        for step in steps
        if step.get("step") not in _BEFORE and isinstance(step.get("at"), (int, float))
    ]
    start, end = (
        (min(began for began, _end in moments), max(last for _began, last in moments)) if moments else (0.0, 1.0)
    )
    lines = []
    for host in hosts:
        steps = [step for step in records[str(host["name"])] if step.get("step") not in _BEFORE]
        record = host["record"] or {}
        lines.append(
            {
                "name": host["name"],
                "outcome": host["outcome"],
                "tone": _TONES.get(str(host["outcome"]), "idle"),
                "message": host["message"],
                "models": ", ".join(host["models"]),
                "driver": _driver(record),
                "bars": bars_of(steps, start, end),
                "out": seconds_text(_out_of_service(steps)) if steps else "",
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
        when=when,
        lines=lines,
        counted=[(word, count, _TONES.get(str(word), "idle")) for word, count in counted.items()],
        plan=plan,
        ticks=_ticks(start, end) if moments else [],
        legend=list(dict.fromkeys((tone, _LEGEND[tone]) for _words, tone in STEPS.values() if tone in _LEGEND)),
    )


_LEGEND = {
    "reload": "drain",
    "restart_nim": "services stop",
    "unload_driver": "driver changes",
    "good": "validation and services until ready",
}


def _driver(record: t.Mapping[str, t.Any]) -> str:
    before = record.get("before")
    old = str(before.get("version") or "none") if isinstance(before, dict) else ""
    return "%s → %s" % (old, record.get("target") or "") if record else ""


def _ticks(start: float, end: float) -> list[tuple[float, str]]:
    """Five moments on the axis: percent, and time of the day in UTC."""
    span = max(end - start, 1.0)
    return [(25.0 * number, time.strftime("%H:%M:%S", time.gmtime(start + span * number / 4))) for number in range(5)]
