# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a rollout is planned from, and how it is told: one look at every host, later what came of it.

A look is what driver_upgrade or nim_deploy returns for state prestaged.
"""

from __future__ import annotations

import typing as t
from dataclasses import replace

from ._rollout import CANARY, RESUME, Batch, FleetHost, Rollout
from ._text_table import shorten, text_table

Row = t.Dict[str, t.Any]
Look = t.Optional[t.Mapping[str, t.Any]]

#: A host whose look was refused: the run does not begin.
REFUSED = "refused"
UNREACHABLE = "unreachable"
SKIPPED = "skipped"
LEFT = "left"
PLANNED = "planned"
DONE = "as wanted"
NO_GPU = "no GPU"
#: What came of it.
UPDATED = "updated"
RESTORED = "restored"
ROLLED_BACK = "rolled back"
OUT = "out of service"
NOT_BEGUN = "not begun"

#: A step of no module: what was there before is put back.
WAY_BACK = "way back"

_KIND_WORDS = {RESUME: "left by an earlier run", CANARY: "canary"}
_DISRUPTIONS = ("none", "reload", "restart_docker", "restart_nim", "unload_driver", "reboot")
_WIDTH = 70
_CELL = 40


def state_of(look: Look, *, skip: bool = False) -> str:
    """What a look at a host says of it before the run."""
    if look is None:
        return UNREACHABLE
    if look.get("unreachable"):
        return UNREACHABLE
    if skip:
        return SKIPPED
    if look.get("failed"):
        return REFUSED
    if not look.get("gpu", True):
        return NO_GPU
    return PLANNED if look.get("due") else DONE


def fleet_host(name: str, look: Look, *, skip: str = "", canary: bool = False) -> FleetHost:
    """A host as the plan of the fleet sees it.

    Args:
        skip: Variable by which the operator leaves it out; empty when he does not.
        canary: Whether the operator wants it to be tried before the others.
    """
    found = look or {}
    state = state_of(look, skip=bool(skip))
    models = frozenset(str(model) for model in found.get("models") or [])
    serving = frozenset(str(model) for model in found.get("serving") or [])
    reason = ""
    available = True
    if state == UNREACHABLE:
        reason, available = "it cannot be reached", False
    elif found.get("failed") and not (skip and "serving" in found):
        # Nothing is known of it; where its work is refused, it is.
        reason, available = "its look failed", False
    if found.get("held"):
        reason, available = str(found["held"]), False
    opened = bool(found.get("open")) and not reason
    if opened:
        available = False
    if skip:
        reason = "%s is true" % skip
    down = available and bool(models) and not serving
    return FleetHost(
        name,
        serving=serving if available else frozenset(),
        models=models,
        due=state not in (DONE, NO_GPU),
        available=available and not down,
        resumable=opened,
        down=down,
        skip=reason,
        canary=canary,
        lost=state == UNREACHABLE,
    )


# -- the plan as a table --------------------------------------------------------------------------


def row_of(name: str, look: Look, plan: Rollout, *, skip: str = "", gateway_error: str = "", note: str = "") -> Row:
    """The row of one host.

    Args:
        gateway_error: Why it could not be drained; empty when nothing speaks against it.
        note: What is said of it when it is in a batch.
    """
    found = look or {}
    state = state_of(look, skip=bool(skip))
    batch = next((batch for batch in plan.batches if name in batch.hosts), None)
    steps = [step for step in found.get("steps") or [] if isinstance(step, dict)]
    disruption = max((str(step.get("disruption")) for step in steps), key=_rank, default="none")
    message = plan.left.get(name, "")
    if state == REFUSED:
        message = str(found.get("msg") or "it cannot be done")
    elif gateway_error and state == PLANNED:
        state, message = REFUSED, gateway_error
    elif batch is None and state == PLANNED:
        state = LEFT
    elif batch is not None:
        message = ". ".join(part.rstrip(".") for part in (str(found.get("way_back") or ""), note) if part)
    return {
        "host": name,
        "state": state,
        "batch": batch.number if batch else None,
        "kind": batch.kind if batch else "",
        "now": str(found.get("loaded") or found.get("runs") or ""),
        "target": str(found.get("target") or ""),
        "models": sorted(str(model) for model in found.get("models") or []),
        "disruption": disruption if batch else "none",
        "steps": [{key: step.get(key) for key in ("what", "from", "to", "why", "disruption")} for step in steps],
        "message": message,
        "reason": str(found.get("reason") or ""),
    }


def _rank(disruption: str) -> int:
    return _DISRUPTIONS.index(disruption) if disruption in _DISRUPTIONS else -1


def refused(rows: t.Sequence[Row]) -> list[str]:
    """Hosts for which the run must not begin."""
    return [str(row["host"]) for row in rows if row["state"] == REFUSED]


def render_plan(rows: t.Sequence[Row], plan: Rollout, *, steps: bool = False) -> str:
    """The plan for people: a line a host, the batches with what serves meanwhile, and what is left and why.

    Args:
        steps: Whether the steps of each host are told, too.
    """
    lines = [
        [
            str(row["host"]),
            str(row["batch"] or "-"),
            shorten(str(row["now"] or "-"), _CELL),
            shorten(str(row["target"] or "-"), _CELL),
            ", ".join(row["models"]) or "-",
            str(row["disruption"]).replace("_", " ") if row["batch"] else "-",
            str(row["state"]),
        ]
        for row in rows
    ]
    text = text_table(["HOST", "BATCH", "NOW", "WANTED", "MODELS", "DISRUPTION", "STATE"], lines)
    below = [_batch_line(batch, plan) for batch in plan.batches]
    below += ["%s: %s." % (row["host"], str(row["message"]).rstrip(".")) for row in rows if row["message"]]
    if steps:
        below += [*_steps(rows), *_moments(plan)]
    below.append(_summary(rows, plan))
    return "\n".join([*text, "", *below])


def _batch_line(batch: Batch, plan: Rollout) -> str:
    kind = _KIND_WORDS.get(batch.kind, "")
    ready = ", ".join(
        "%s %d of %d" % (model, count, max(count, plan.capacity.get(model, 0)))
        for model, count in sorted(batch.capacity.items())
    )
    return "Batch %d%s: %s. Out of service meanwhile: %d of at most %d hosts%s." % (
        batch.number,
        " (%s)" % kind if kind else "",
        ", ".join(batch.hosts),
        batch.unavailable,
        plan.max_unavailable,
        "; ready: " + ready if ready else "",
    )


def _steps(rows: t.Sequence[Row]) -> list[str]:
    """The steps, once for all hosts that have the same ones."""
    same: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["batch"]:
            told = tuple(
                "  %d. %s: %s -> %s"
                % (number, shorten(str(step["what"]), _WIDTH), step["from"] or "-", step["to"] or "-")
                for number, step in enumerate(row["steps"], 1)
            )
            same.setdefault(told, []).append(str(row["host"]))
    return [line for told, hosts in same.items() for line in ("Steps on %s:" % ", ".join(hosts), *told)]


def _moments(plan: Rollout) -> list[str]:
    """Ready replicas of every model at each moment. Between two batches all hosts of the first are back."""
    models = sorted({*plan.capacity, *plan.after})
    if not models or not plan.batches:
        return []
    lines = [["before", *(str(plan.capacity.get(model, 0)) for model in models)]]
    for batch in plan.batches:
        lines.append(["batch %d" % batch.number, *(str(batch.capacity.get(model, 0)) for model in models)])
    lines.append(["after", *(str(plan.after.get(model, 0)) for model in models)])
    return ["Ready replicas of every model at each moment:", *text_table(["", *models], lines)]


def _summary(rows: t.Sequence[Row], plan: Rollout) -> str:
    return "%d of %d hosts are to be updated in %d batch%s; %d %s as wanted." % (
        len(plan.order),
        len(rows),
        len(plan.batches),
        "" if len(plan.batches) == 1 else "es",
        len(plan.done),
        "is" if len(plan.done) == 1 else "are",
    )


# -- what came of it ------------------------------------------------------------------------------


def outcome_of(results: t.Sequence[Look], *, resumable: bool = False) -> str:
    """What came of a host's turn.

    Args:
        results: What its module returned for it after the look, the last call first; None for calls that never came. The last
            entry is the call with which the turn begins.
        resumable: Whether the host was out of service before.
    """
    answers = [answer if answer and not answer.get("skipped") else None for answer in results]
    if not any(answers):
        return NOT_BEGUN
    if any(answer.get("unreachable") or answer.get("lost") for answer in answers if answer):
        return OUT
    words = {"updated": UPDATED, "restored": RESTORED, "rolled_back": ROLLED_BACK, "stranded": OUT}
    last = next(answer for answer in answers if answer)
    if last is not answers[-1]:
        return words.get(str(last.get("outcome") or ""), OUT)
    if last.get("failed"):
        # Refused before anything was touched.
        return OUT if resumable or last.get("outcome") == "stranded" else RESTORED
    if last.get("held"):
        return NOT_BEGUN
    return OUT if last.get("due") else UPDATED


def after(host: FleetHost, outcome: str) -> FleetHost:
    """A host of the plan as it is after its turn."""
    if outcome == NOT_BEGUN:
        return host
    serves = outcome in (UPDATED, RESTORED, ROLLED_BACK)
    # It had its turn: the next run asks again.
    return replace(
        host,
        due=False,
        available=serves,
        resumable=False,
        down=False,
        serving=host.serving | host.models if serves else frozenset(),
    )


def record_of(results: t.Sequence[Look]) -> t.Mapping[str, t.Any]:
    """The newest record of a host among results, the last call first."""
    for answer in results:
        record = (answer or {}).get("record")
        if isinstance(record, dict) and record:
            return record
    return {}


def message_of(results: t.Sequence[Look]) -> str:
    """Why a host was not updated, in its own words; empty when nothing failed and nobody holds it."""
    for answer in results:
        if answer and (answer.get("failed") or answer.get("unreachable")):
            return str(answer.get("msg") or "it cannot be reached")
        if answer and answer.get("held"):
            return str(answer["held"])
    return ""


def steps_of(record: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
    """The steps on record whose time is known, and, as two more, the one that failed and the way back from it."""
    failure = record.get("failure") or {}
    steps = list(record.get("steps") or [])
    if any(step.get("step") == "drained" for step in steps):
        at = failure.get("at")
        steps.append({"step": failure.get("step"), "at": failure.get("began"), "until": at})
        steps.append({"step": WAY_BACK, "at": at, "until": failure.get("until", at)})
    found = []
    for step in steps:
        if isinstance(step.get("at"), (int, float)):
            until = step.get("until", 0.0)
            seconds = max(
                float(step.get("seconds") or 0), (until if isinstance(until, (int, float)) else 0.0) - step["at"]
            )
            found.append({"step": step.get("step"), "at": float(step["at"]), "seconds": max(0.0, seconds)})
    return found


def out_of_service(record: t.Mapping[str, t.Any]) -> float:
    """Seconds between the drain and the return, or the last that is known; 0.0 for a host that was not taken out."""
    steps = steps_of(record)
    begun = [float(step["at"]) for step in steps if step["step"] == "drained"]
    if not begun:
        return 0.0
    return max(0.0, max(float(step["at"]) + float(step["seconds"]) for step in steps) - begun[0])


def seconds_text(seconds: float) -> str:
    """``42 s``, ``3 min 5 s``, ``1 h 2 min``."""
    whole = round(seconds)
    if whole < 60:
        return "%d s" % whole
    if whole < 3600:
        return "%d min %d s" % divmod(whole, 60)
    return "%d h %d min" % (whole // 3600, whole % 3600 // 60)


def render_end(
    outcomes: t.Mapping[str, str],
    messages: t.Mapping[str, str],
    records: t.Mapping[str, t.Mapping[str, t.Any]],
    left: t.Mapping[str, str],
    traffic: t.Sequence[str] = (),
) -> str:
    """What came of all hosts, for people.

    Args:
        messages: Host -> what went wrong.
        records: Host -> what is on record there.
        left: Hosts that were in no batch, and why.
        traffic: Lines about the requests meanwhile.
    """
    lines = []
    for name, outcome in outcomes.items():
        seconds = 0.0 if outcome == NOT_BEGUN else out_of_service(records.get(name, {}))
        lines.append([name, outcome, seconds_text(seconds) if seconds else "-"])
    counted = {word: list(outcomes.values()).count(word) for word in dict.fromkeys(outcomes.values())}
    below = ["%s: %s" % (name, message) for name, message in messages.items() if message]
    below += ["%s was left: %s." % (name, reason.rstrip(".")) for name, reason in left.items()]
    below += traffic
    if not lines:
        return "\n".join([*below, "No host was updated."])
    below.append(", ".join("%d %s" % (count, word) for word, count in counted.items()) + ".")
    return "\n".join([*text_table(["HOST", "OUTCOME", "OUT OF SERVICE"], lines), "", *below])
