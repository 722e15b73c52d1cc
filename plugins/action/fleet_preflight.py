# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prints what cannot work on the hosts of the play; connects to none of them."""

from __future__ import annotations

import typing as t

from ansible.errors import AnsibleActionFail
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _fleet_preflight
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._answers import PREFLIGHT
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._fleet_table import FleetTableBase, Look, Row


class ActionModule(FleetTableBase):
    shape = PREFLIGHT
    options: t.ClassVar[dict[str, dict[str, t.Any]]] = {"fail_on_refusal": {"type": "bool", "default": True}}

    def rows(self, host: str, look: Look, variables: t.Mapping[str, t.Any]) -> list[Row]:
        return _fleet_preflight.rows_of(host, look)

    def ordered(self, rows: list[Row]) -> list[Row]:
        return _fleet_preflight.ordered(rows)

    def render(self, rows: list[Row], notes: list[str]) -> str:
        return _fleet_preflight.render_table(rows)

    def conclude(self, rows: list[Row], args: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        hosts = _fleet_preflight.refused(rows)
        if hosts and args["fail_on_refusal"]:
            # The rows were shown; printed once more as the result of a failed task they would bury the sentence.
            raise AnsibleActionFail("Something cannot work, or could not be judged, on %s." % ", ".join(hosts))
        return {"verdict": _fleet_preflight.worst_of(rows), "hosts": hosts}
