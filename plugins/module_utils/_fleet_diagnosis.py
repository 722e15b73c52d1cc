# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The findings of a fleet as rows and as a table, made on the controller out of the diagnosis of every host."""

from __future__ import annotations

import typing as t

from ._findings import FAILED, NOTED, SEVERITIES, WARNED
from ._text_table import one_line, shorten, text_table

Row = t.Dict[str, t.Any]

#: Severity of a host without findings.
SOUND = "ok"
#: Reasons of rows that no look at the host has given.
UNREACHABLE = "unreachable"
LOOK_FAILED = "look_failed"
NOT_LOOKED_AT = "not_looked_at"

KEYS = ("severity", "model", "layer", "gpu", "reason", "cause", "remedy", "evidence", "signature")
COLUMNS = ("HOST", "MODEL", "SEVERITY", "REASON", "CAUSE")
#: Characters of the last column; the whole text is below the table.
_WIDTH = 110


def rows_of(host: str, look: t.Mapping[str, t.Any] | None) -> list[Row]:
    """One row a finding; a host without any, or one that could not be looked at, is one row.

    Args:
        look: What ``gpu_host_diagnosis`` returned, or Ansible's word that it failed or never ran.
    """
    base: Row = {"host": host, **dict.fromkeys(KEYS), "evidence": []}
    if look is None:
        return [dict(base, severity=FAILED, reason=NOT_LOOKED_AT, cause="the host was not looked at")]
    message = " ".join(str(look.get("msg") or "no reason given").split())
    if look.get("unreachable"):
        return [dict(base, severity=FAILED, reason=UNREACHABLE, cause="the host cannot be reached: %s" % message)]
    if look.get("failed") or look.get("findings") is None:
        reason = str(look.get("reason") or LOOK_FAILED)
        return [dict(base, severity=FAILED, reason=reason, cause="the host could not be looked at: %s" % message)]
    rows = [dict(base, **{key: finding.get(key) for key in KEYS}) for finding in look["findings"]]
    return rows or [dict(base, severity=SOUND)]


def _rank(row: Row) -> int:
    return SEVERITIES.index(row["severity"]) if row["severity"] in SEVERITIES else len(SEVERITIES)


def ordered(rows: t.Sequence[Row]) -> list[Row]:
    """Host by host, the worst first; the findings of a host stay in the order in which it told them."""
    worst: dict[str, int] = {}
    position: dict[str, int] = {}
    for number, row in enumerate(rows):
        worst[row["host"]] = min(worst.get(row["host"], len(SEVERITIES)), _rank(row))
        position.setdefault(row["host"], number)
    return sorted(rows, key=lambda row: (worst[row["host"]], position[row["host"]]))


def count(rows: t.Sequence[Row], severity: str) -> int:
    return sum(row["severity"] == severity for row in rows)


def summary(rows: t.Sequence[Row]) -> str:
    """One line below the table."""
    hosts = list(dict.fromkeys(row["host"] for row in rows))
    sound = {row["host"] for row in rows} - {row["host"] for row in rows if row["severity"] in (FAILED, WARNED)}
    return "%d of %d hosts without a failure or warning; %d failed, %d warnings, %d notes." % (
        len(sound),
        len(hosts),
        count(rows, FAILED),
        count(rows, WARNED),
        count(rows, NOTED),
    )


def render_table(rows: t.Sequence[Row], notes: t.Sequence[str] = ()) -> str:
    """The rows as a table of plain text; below it every finding with its remedy and its most telling line."""
    lines = [
        [
            str(row["host"]),
            row["model"] or "-",
            row["severity"],
            row["reason"] or "-",
            shorten(row["cause"] or "-", _WIDTH),
        ]
        for row in rows
    ]
    text = text_table(COLUMNS, lines, group=1)
    below: list[str] = []
    for row in rows:
        if row["severity"] not in SEVERITIES:
            continue
        name = "%s/%s" % (row["host"], one_line(row["model"])) if row["model"] else str(row["host"])
        below.append("%s: %s: %s." % (name, row["severity"], one_line(str(row["cause"])).rstrip(".")))
        if row["remedy"]:
            below.append("    to do: %s." % one_line(str(row["remedy"])).rstrip("."))
        below += ["    | %s" % shorten(line, 200) for line in (row["evidence"] or [])[:1]]
    return "\n".join([*text, "", *below, *map(one_line, notes), summary(rows)])
