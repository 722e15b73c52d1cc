# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What cannot work on a fleet, as rows and as a table, made on the controller out of what was found on every host."""

from __future__ import annotations

import typing as t

from ._text_table import one_line, text_table
from ._verdict import OK, REFUSED, UNKNOWN, WARNING

Row = t.Dict[str, t.Any]

#: Verdicts on hosts that could not be judged; they count as refused.
UNREACHABLE = "unreachable"
FAILED = "look failed"
NOT_LOOKED_AT = "not looked at"

#: Best first.
_ORDER = (OK, UNKNOWN, WARNING, NOT_LOOKED_AT, FAILED, UNREACHABLE, REFUSED)
_KEYS = ("check", "verdict", "message", "remedy", "reason", "gpu", "subject")

#: Of a host for which nothing was asked.
_NOTHING = "There was nothing to judge."

COLUMNS = (("HOST", "host"), ("VERDICT", "verdict"), ("CHECK", "check"), ("WHAT AND WHAT TO DO", "text"))


def rows_of(host: str, look: t.Mapping[str, t.Any] | None) -> list[Row]:
    """One row a check of the host; a host that could not be judged is one row.

    Args:
        look: What ``gpu_host_preflight`` returned, or Ansible's word that it failed or never ran.
    """
    base: Row = {"host": host, **dict.fromkeys(_KEYS, "")}
    if look is None:
        return [dict(base, verdict=NOT_LOOKED_AT)]
    message = " ".join(str(look.get("msg") or "").split())
    if look.get("unreachable"):
        return [dict(base, verdict=UNREACHABLE, message=message)]
    rows = [dict(base, **{key: check.get(key, "") for key in _KEYS}) for check in look.get("checks") or []]
    # A module that was told to fail on refusals has its checks all the same.
    refuses = any(row["verdict"] == REFUSED for row in rows)
    if look.get("checks") is None or (look.get("failed") and not refuses):
        return [dict(base, verdict=FAILED, message=message, reason=str(look.get("reason") or ""))]
    return rows or [dict(base, verdict=OK, message=_NOTHING)]


def _rank(row: Row) -> int:
    return _ORDER.index(row["verdict"])


def worst_of(rows: t.Sequence[Row]) -> str:
    """The worst verdict of all; ``ok`` when there are none."""
    return str(max(rows, key=_rank)["verdict"]) if rows else OK


def ordered(rows: t.Sequence[Row]) -> list[Row]:
    """The rows host by host, the worst host and the worst row first; otherwise the order stays."""
    worst: dict[str, int] = {}
    position: dict[str, int] = {}
    for number, row in enumerate(rows):
        worst[row["host"]] = max(worst.get(row["host"], 0), _rank(row))
        position.setdefault(row["host"], number)
    return sorted(rows, key=lambda row: (-worst[row["host"]], position[row["host"]], -_rank(row)))


def refused(rows: t.Sequence[Row]) -> list[str]:
    """Hosts where something cannot work, or that could not be judged."""
    return list(dict.fromkeys(str(row["host"]) for row in rows if _rank(row) > _ORDER.index(WARNING)))


def render_table(rows: t.Sequence[Row]) -> str:
    """The rows as a table of plain text; what is in order is only counted."""
    lines = []
    for host in dict.fromkeys(row["host"] for row in rows):
        own = [row for row in rows if row["host"] == host]
        shown = [row for row in own if row["verdict"] != OK]
        passed = len(own) - len(shown)
        if passed and not shown:
            shown = [dict.fromkeys(("gpu", "subject", "remedy", "check"), "")]
            told = _NOTHING if own[0]["message"] == _NOTHING else "All %d checks passed." % passed
            shown[0].update(host=host, verdict=OK, message=told)
        for row in shown:
            lines.append([str(row["host"]), str(row["verdict"]), str(row["check"]), _sentence(row)])
    text = text_table([heading for heading, _key in COLUMNS], lines, group=1)
    return "\n".join([*text, "", summary(rows)])


def _sentence(row: Row) -> str:
    text = one_line(str(row["message"]))
    remedy = one_line(str(row["remedy"]))
    return "%s; %s." % (text.rstrip("."), remedy.rstrip(".")) if remedy else text


def summary(rows: t.Sequence[Row]) -> str:
    """One line below the table."""
    hosts = list(dict.fromkeys(row["host"] for row in rows))
    bad = refused(rows)
    counts = [(verdict, sum(row["verdict"] == verdict for row in rows)) for verdict in (REFUSED, WARNING, UNKNOWN, OK)]
    return "%d of %d hosts can go on; checks: %s." % (
        len(hosts) - len(bad),
        len(hosts),
        ", ".join("%d %s" % (count, verdict) for verdict, count in counts if count) or "none",
    )
