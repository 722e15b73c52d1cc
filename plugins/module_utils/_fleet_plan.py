# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The plan of a fleet as rows and as a table, made on the controller out of one plan of every host."""

from __future__ import annotations

import typing as t

from ._resource import Disruption
from ._text_table import one_line, shorten, text_table, value_text

Row = t.Dict[str, t.Any]

#: States of a row.
CHANGE = "change"
ERROR = "cannot be planned"
AS_WANTED = "as wanted"
NO_GPU = "no GPU"
UNREACHABLE = "unreachable"
FAILED = "look failed"
NOT_LOOKED_AT = "not looked at"

#: Rows of hosts of which nothing has to change; all other states count as drift.
SETTLED = (AS_WANTED, NO_GPU)

COLUMNS = (
    ("HOST", "host"),
    ("DISRUPTION", "disruption"),
    ("RESOURCE", "resource"),
    ("WHAT", "what"),
    ("FROM -> TO", "change"),
    ("WHY", "why"),
)
#: Characters of a cell; the rest is in the JSON.
_WIDTH = 44
#: The last column may be longer: it pushes nothing aside.
_LAST_WIDTH = 160


def rows_of(host: str, look: t.Mapping[str, t.Any] | None) -> list[Row]:
    """One row a change or error of the host; a host without any, or one that could not be looked at, is one row.

    Args:
        look: What ``gpu_host_plan`` returned, or Ansible's word that it failed or never ran.
    """
    base: Row = dict.fromkeys(
        ("resource", "what", "from", "to", "why", "disruption", "blocked", "after", "reason", "message")
    )
    base = {"host": host, "state": "", **base}
    if look is None:
        return [dict(base, state=NOT_LOOKED_AT)]
    message = " ".join(str(look.get("msg") or "").split()) or None
    if look.get("unreachable"):
        return [dict(base, state=UNREACHABLE, message=message)]
    if look.get("failed") or look.get("changes") is None:
        return [dict(base, state=FAILED, message=message)]
    rows = [
        dict(
            base,
            state=ERROR,
            resource=error.get("resource"),
            reason=error.get("reason"),
            after=error.get("after"),
            message=error.get("message"),
        )
        for error in look.get("errors") or []
    ]
    keys = ("resource", "what", "from", "to", "why", "disruption", "blocked", "after")
    rows += [dict(base, state=CHANGE, **{key: change.get(key) for key in keys}) for change in look["changes"]]
    if rows:
        return rows
    return [dict(base, state=AS_WANTED if look.get("gpu", True) else NO_GPU)]


def _rank(row: Row) -> int:
    """How much a row wants to be seen: what is unknown first, then the disruption."""
    if row["state"] in SETTLED:
        return -1
    if row["state"] != CHANGE:
        return len(Disruption)
    return int(Disruption[str(row["disruption"]).upper()])


def ordered(rows: t.Sequence[Row]) -> list[Row]:
    """The rows host by host, the worst host and the worst row first; otherwise the order stays."""
    worst: dict[str, int] = {}
    position: dict[str, int] = {}
    for number, row in enumerate(rows):
        worst[row["host"]] = max(worst.get(row["host"], -1), _rank(row))
        position.setdefault(row["host"], number)
    return sorted(rows, key=lambda row: (-worst[row["host"]], position[row["host"]], -_rank(row)))


def drifted(rows: t.Sequence[Row]) -> list[str]:
    """Hosts that are not, or are not known to be, as wanted."""
    return list(dict.fromkeys(str(row["host"]) for row in rows if row["state"] not in SETTLED))


def summary(rows: t.Sequence[Row]) -> str:
    """One line below the table."""
    hosts = list(dict.fromkeys(row["host"] for row in rows))
    drift = drifted(rows)
    changes = sum(row["state"] == CHANGE for row in rows)
    return "%d of %d hosts %s as wanted; %d change%s." % (
        len(hosts) - len(drift),
        len(hosts),
        "is" if len(hosts) - len(drift) == 1 else "are",
        changes,
        "" if changes == 1 else "s",
    )


def render_table(rows: t.Sequence[Row], notes: t.Sequence[str] = ()) -> str:
    """The rows as a table of plain text, with what would be left out or went wrong below it."""
    lines = [[_cell(row, key) for _heading, key in COLUMNS] for row in rows]
    text = text_table([heading for heading, _key in COLUMNS], lines, group=1)
    below: list[str] = []
    left_out: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["message"]:
            name = "%s/%s" % (row["host"], row["resource"]) if row["resource"] else str(row["host"])
            below.append("%s: %s" % (name, row["message"]))
        if row["blocked"]:
            left_out.setdefault((str(row["host"]), str(row["blocked"])), []).append(str(row["what"]))
    below += ["%s: left out: %s: %s" % (host, ", ".join(what), why) for (host, why), what in left_out.items()]
    return "\n".join([*text, "", *dict.fromkeys(map(one_line, [*below, *notes])), summary(rows)])


def _cell(row: Row, key: str) -> str:
    if row["state"] == CHANGE:
        if key == "change":
            return "%s -> %s" % (
                shorten(value_text(row["from"]), _WIDTH // 2),
                shorten(value_text(row["to"]), _WIDTH // 2),
            )
        text = value_text(row[key])
        if key == "disruption" and row["blocked"]:
            text += " (left out)"
        return shorten(text, _LAST_WIDTH if key == "why" else _WIDTH)
    if key == "disruption":
        return "-"
    if key == "what":
        return str(row["state"])
    return str(row[key] or "") if key in ("host", "resource") else ""
