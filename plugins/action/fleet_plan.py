# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prints the plan of all hosts of the play; connects to none of them."""

from __future__ import annotations

import time
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils import _fleet_plan
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._answers import FACTS, PLAN, read_answer
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._fleet_report import render_report
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._fleet_table import (
    FleetTableBase,
    Look,
    Row,
    address_of,
    write_file,
)


class ActionModule(FleetTableBase):
    shape = PLAN
    options: t.ClassVar[dict[str, dict[str, t.Any]]] = {
        "fail_on_drift": {"type": "bool", "default": False},
        "report": {"type": "path"},
        "facts": {"type": "str"},
    }

    def rows(self, host: str, look: Look, variables: t.Mapping[str, t.Any]) -> list[Row]:
        return _fleet_plan.rows_of(host, look)

    def ordered(self, rows: list[Row]) -> list[Row]:
        return _fleet_plan.ordered(rows)

    def render(self, rows: list[Row], notes: list[str]) -> str:
        return _fleet_plan.render_table(rows, notes)

    def conclude(self, rows: list[Row], args: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        if args["report"] and not self._task.check_mode:
            write_file(args["report"], self._report(list(dict.fromkeys(row["host"] for row in rows)), args))
        hosts = _fleet_plan.drifted(rows)
        result: dict[str, t.Any] = {"drift": bool(hosts), "hosts": hosts}
        if hosts and args["fail_on_drift"]:
            result["failed"] = True
            result["msg"] = "Not as wanted, or not known to be: %s." % ", ".join(hosts)
        return result

    def _report(self, hosts: list[str], args: t.Mapping[str, t.Any]) -> str:
        seen = []
        for host in hosts:
            variables = self.variables[host]
            facts = read_answer(variables.get(args["facts"]), FACTS) if args["facts"] else None
            plan = read_answer(variables.get(args["variable"]), PLAN)
            seen.append((host, address_of(host, variables), plan, facts))
        return render_report(seen, time.strftime("%Y-%m-%d at %H:%M UTC", time.gmtime()))
