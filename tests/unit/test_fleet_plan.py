# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of the fleet as a table."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.action import fleet_plan as fleet_plan_action
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _fleet_plan
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils import _fleet_table

CHANGE = {
    "resource": "nim_service",
    "what": "nim-llama.service",
    "from": "started",
    "to": "restarted",
    "why": "the container runs something else",
    "disruption": "restart_nim",
    "blocked": None,
    "after": None,
}
ERROR = {"resource": "docker_daemon", "reason": "daemon_json_invalid", "message": "Reading failed.", "after": None}
LOOKS: dict[str, t.Any] = {
    "quiet": {"gpu": True, "changes": [], "errors": []},
    "mild": {"gpu": True, "errors": [], "changes": [{**CHANGE, "disruption": "none", "from": None, "to": {"a": 1}}]},
    "busy": {"gpu": True, "errors": [], "changes": [CHANGE, {**CHANGE, "what": "x", "blocked": "maintenance"}]},
    "cpu": {"gpu": False, "changes": [], "errors": []},
    "down": {"unreachable": True, "msg": "no\n route", "changed": False},
    "sudo": {"failed": True, "msg": "Missing sudo password"},
    "broken": {"gpu": True, "changes": [], "errors": [ERROR]},
    "never": None,
}


def all_rows() -> list[dict[str, t.Any]]:
    return _fleet_plan.ordered([row for host, look in LOOKS.items() for row in _fleet_plan.rows_of(host, look)])


def test_rows_and_their_order() -> None:
    rows = all_rows()
    assert [(row["host"], row["state"]) for row in rows] == [
        ("down", "unreachable"),
        ("sudo", "look failed"),
        ("broken", "cannot be planned"),
        ("never", "not looked at"),
        ("busy", "change"),
        ("busy", "change"),
        ("mild", "change"),
        ("quiet", "as wanted"),
        ("cpu", "no GPU"),
    ]
    assert rows[0]["message"] == "no route"
    assert _fleet_plan.drifted(rows) == ["down", "sudo", "broken", "never", "busy", "mild"]


def test_table() -> None:
    lines = _fleet_plan.render_table([row for row in all_rows() if row["host"] in ("down", "busy", "mild", "cpu")])
    assert lines.splitlines() == [
        "HOST  DISRUPTION              RESOURCE     WHAT               FROM -> TO            WHY",
        "down  -                                    unreachable",
        "busy  restart_nim             nim_service  nim-llama.service  started -> restarted  the container runs something else",
        "      restart_nim (left out)  nim_service  x                  started -> restarted  the container runs something else",
        'mild  none                    nim_service  nim-llama.service  - -> {"a": 1}         the container runs something else',
        "cpu   -                                    no GPU",
        "",
        "down: no route",
        "busy: left out: x: maintenance",
        "1 of 4 hosts is as wanted; 3 changes.",
    ]


def run_table(
    monkeypatch: pytest.MonkeyPatch, hosts: t.Sequence[str], **arguments: t.Any
) -> tuple[dict[str, t.Any], str]:
    plugin = fleet_plan_action.ActionModule.__new__(fleet_plan_action.ActionModule)
    shown: list[str] = []
    arguments = {
        "format": "table",
        "output": None,
        "fail_on_drift": False,
        "variable": "plan",
        "report": None,
        "facts": None,
        **arguments,
    }
    monkeypatch.setattr(_fleet_table.ActionBase, "run", lambda *_arguments: {})
    monkeypatch.setattr(plugin, "validate_argument_spec", lambda **_options: (None, arguments), raising=False)
    monkeypatch.setattr(plugin, "_display", type("D", (), {"display": staticmethod(shown.append)}), raising=False)
    monkeypatch.setattr(plugin, "_task", type("T", (), {"check_mode": False}), raising=False)
    variables = {host: {} if LOOKS[host] is None else {"plan": LOOKS[host]} for host in hosts}
    result = plugin.run(None, {"ansible_play_hosts_all": list(hosts), "hostvars": variables})
    return result, "\n".join(shown)


def test_drift_fails_only_where_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: t.Any) -> None:
    result, text = run_table(monkeypatch, ["quiet", "down"])
    assert "failed" not in result
    assert (result["drift"], result["hosts"]) == (True, ["down"])
    result, text = run_table(
        monkeypatch, ["quiet", "down"], fail_on_drift=True, format="json", output=str(tmp_path / "plan.json")
    )
    assert result["failed"] is True
    assert result["msg"] == "Not as wanted, or not known to be: down."
    assert json.loads(text) == json.loads((tmp_path / "plan.json").read_text()) == result["rows"]
    result, text = run_table(monkeypatch, ["quiet", "cpu"], fail_on_drift=True)
    assert "failed" not in result
