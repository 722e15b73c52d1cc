# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prints the diagnosis of all hosts of the play; connects to none of them."""

from __future__ import annotations

import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils import _fleet_diagnosis
from ansible_collections.gpu_fleet.nim.plugins.module_utils._findings import FAILED, WARNED
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._answers import DIAGNOSIS
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._fleet_table import FleetTableBase, Look, Row


class ActionModule(FleetTableBase):
    shape = DIAGNOSIS
    options: t.ClassVar[dict[str, dict[str, t.Any]]] = {
        "fail_on": {"type": "str", "choices": ["never", "failed", "warning"], "default": "never"}
    }

    def __init__(self, *arguments: t.Any, **more: t.Any) -> None:
        super().__init__(*arguments, **more)
        self.bundles: list[str] = []

    def rows(self, host: str, look: Look, variables: t.Mapping[str, t.Any]) -> list[Row]:
        if look and look.get("bundle"):
            self.bundles.append("Support bundle: %s" % look["bundle"])
        return _fleet_diagnosis.rows_of(host, look)

    def ordered(self, rows: list[Row]) -> list[Row]:
        return _fleet_diagnosis.ordered(rows)

    def render(self, rows: list[Row], notes: list[str]) -> str:
        return _fleet_diagnosis.render_table(rows, [*self.bundles, *notes])

    def conclude(self, rows: list[Row], args: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        bad = {"never": (), "failed": (FAILED,), "warning": (FAILED, WARNED)}[args["fail_on"]]
        hosts = list(dict.fromkeys(row["host"] for row in rows if row["severity"] in (FAILED, WARNED)))
        result: dict[str, t.Any] = {"hosts": hosts}
        found = list(dict.fromkeys(row["host"] for row in rows if row["severity"] in bad))
        if found:
            result["failed"] = True
            result["msg"] = "Something is wrong with: %s." % ", ".join(found)
        return result
