# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What cannot work on a fleet, as a table."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._fleet_preflight import (
    ordered,
    refused,
    render_table,
    rows_of,
    worst_of,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._verdict import OK, REFUSED, UNKNOWN, WARNING, Verdict


def look(*verdicts: Verdict, **more: t.Any) -> dict[str, t.Any]:
    return {"checks": [verdict.as_dict() for verdict in verdicts], **more}


GOOD = Verdict("port", OK, "Model a: port 8000 is free.", subject="a")
OPEN = Verdict("ecc", UNKNOWN, "GPU 0 does not tell of memory errors.", "", "not_told", "GPU-1")
WARNED = Verdict("persistence", WARNING, "Persistence mode is off.", "start nvidia-persistenced", "persistence_off")
BAD = Verdict("memory_repair", REFUSED, "GPU 0 has bad memory.", "reset it", "row_remap_pending", "GPU-1")


def rows() -> list[dict[str, t.Any]]:
    return ordered(
        [
            *rows_of("good", look(GOOD, GOOD)),
            *rows_of("open", look(GOOD, OPEN)),
            *rows_of("warned", look(GOOD, WARNED)),
            *rows_of("bad", look(GOOD, WARNED, BAD, msg="x", failed=True)),
            *rows_of("down", {"unreachable": True, "msg": "Failed to connect\nto the host"}),
            *rows_of("broken", {"failed": True, "msg": "sudo: a password is required"}),
            *rows_of("never", None),
        ]
    )


def test_the_worst_first() -> None:
    found = rows()
    hosts = list(dict.fromkeys(row["host"] for row in found))
    assert hosts == ["bad", "down", "broken", "never", "warned", "open", "good"]
    assert [row["verdict"] for row in found][:4] == [REFUSED, WARNING, OK, "unreachable"]
    assert refused(found) == ["bad", "down", "broken", "never"]
    assert worst_of(found) == REFUSED
    assert refused(ordered(rows_of("open", look(OPEN, WARNED)))) == []
    assert (worst_of([]), refused([])) == (OK, [])


def test_table() -> None:
    text = render_table(rows())
    lines = text.splitlines()
    assert lines[0].split() == ["HOST", "VERDICT", "CHECK", "WHAT", "AND", "WHAT", "TO", "DO"]
    assert lines[1].split() == ["bad", "refused", "memory_repair", "GPU", "0", "has", "bad", "memory;", "reset", "it."]
    # The host is named once, and what passed is not listed.
    assert lines[2].startswith("        ") and "Persistence mode is off; start nvidia-persistenced." in lines[2]
    assert "port" not in text
    squeezed = [" ".join(line.split()) for line in lines]
    assert "down unreachable Failed to connect to the host" in squeezed
    assert "good ok All 2 checks passed." in squeezed
    assert lines[-1] == "3 of 7 hosts can go on; checks: 1 refused, 2 warning, 1 unknown, 5 ok."


def test_a_host_without_a_check_has_passed_none() -> None:
    text = render_table(rows_of("empty", look()))
    assert "There was nothing to judge." in text and "passed" not in text


def test_a_module_that_failed_without_a_refusal_has_judged_nothing() -> None:
    for checks in ((), (GOOD,), (WARNED,)):
        (row,) = rows_of("odd", look(*checks, failed=True, msg="boom"))
        assert (row["verdict"], row["message"]) == ("look failed", "boom")
        assert refused([row]) == ["odd"]
