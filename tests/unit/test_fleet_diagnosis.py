# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of findings."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._fleet_diagnosis import ordered, render_table, rows_of


def finding(severity: str, reason: str, **more: t.Any) -> dict[str, t.Any]:
    return {"severity": severity, "reason": reason, "cause": "why %s" % reason, "remedy": "do", "layer": "host", **more}


LOOKS: dict[str, t.Any] = {
    "quiet": {"findings": []},
    "warned": {"findings": [finding("warning", "disk_full"), finding("note", "xid", remedy=None)]},
    "down": {"unreachable": True, "msg": "no route"},
    "sick": {"findings": [finding("failed", "gpus_lost", model="llama", evidence=["line 1", "line 2"])]},
    "refused": {"failed": True, "msg": "sudo wants a\npassword"},
    "never": None,
}


def rows() -> list[dict[str, t.Any]]:
    return ordered([row for host, look in LOOKS.items() for row in rows_of(host, look)])


def test_the_worst_host_first() -> None:
    assert [(row["host"], row["severity"], row["reason"]) for row in rows()] == [
        ("down", "failed", "unreachable"),
        ("sick", "failed", "gpus_lost"),
        ("refused", "failed", "look_failed"),
        ("never", "failed", "not_looked_at"),
        ("warned", "warning", "disk_full"),
        ("warned", "note", "xid"),
        ("quiet", "ok", None),
    ]


def test_table() -> None:
    text = render_table(rows(), ["a note"])
    lines = text.splitlines()
    assert lines[0].split() == ["HOST", "MODEL", "SEVERITY", "REASON", "CAUSE"]
    assert lines[2].split()[:4] == ["sick", "llama", "failed", "gpus_lost"]
    assert "sick/llama: failed: why gpus_lost." in lines
    assert "    | line 1" in lines
    assert "line 2" not in text
    assert "refused: failed: the host could not be looked at: sudo wants a password." in lines
    assert lines.count("    to do: do.") == 2
    assert lines[-2] == "a note"
    assert lines[-1] == "1 of 6 hosts without a failure or warning; 4 failed, 1 warnings, 1 notes."
